"""Training: one loop for every paper, its data, its checkpoints, what is trained."""
