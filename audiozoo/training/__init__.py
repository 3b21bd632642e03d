"""Training: steps, losses and optimisers that several papers share."""
