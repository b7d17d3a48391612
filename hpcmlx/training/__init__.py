"""Fine-tuning over a mesh: data, losses, schedules of stages, optimizers, checkpoints."""
