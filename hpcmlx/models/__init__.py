"""From a checkpoint on disk to this rank's part of a model."""
