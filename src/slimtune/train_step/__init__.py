"""One training step: loss, evaluation of rows, optimizer, ways to save memory."""
