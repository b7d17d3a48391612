"""Launching from a login node: host files and `mpirun` lines. Needs neither MPI nor MLX."""
