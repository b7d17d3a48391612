"""What a training run has made of a model, as others want it: adapters and merged models."""
