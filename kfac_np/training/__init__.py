"""Training: data, models by name, the loop, checkpoints, run directories and pictures."""
