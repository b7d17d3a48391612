"""Sweeps (`-m`): one command, several points, each a job with a run directory of its own.

`run.py` is what a job calls. Hydra reads the values and drives the sweeper; the launchers of
`plugins.py` are ours: `local.py` starts an mpirun for every point, `array.py` one array of Slurm's.
"""
