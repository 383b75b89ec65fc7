"""One training run: recipe to adapter, training loop, checkpoints, recovery from running out of memory."""
