"""One training run: transformers' Trainer, our loss, checkpoints that are whole or absent, the record of the run."""
