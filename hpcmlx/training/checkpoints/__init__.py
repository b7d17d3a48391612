"""Checkpoints that ranks write together and that any layout reads."""
