"""The tests. Importing hpcmlx first, before any of them imports MLX, gives them a fast BLAS."""

import hpcmlx  # noqa: F401
