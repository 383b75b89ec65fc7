"""Whether a job will run, before a weight is loaded: the real step on tensors that have shapes and no values."""
