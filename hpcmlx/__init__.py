"""hpcmlx: batch inference and fine-tuning of mlx-lm models over MPI ranks.

Importing the package puts a fast BLAS in front of MLX's reference one on Linux CPU hosts; that
works only while `mlx.core` has not been imported yet, so import hpcmlx first.
"""

from hpcmlx import blas

__version__ = "0.1.0"

BLAS = blas.interpose()
