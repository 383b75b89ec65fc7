"""One training step: loss, evaluation of rows, activation memory savings."""
