"""What a run learned: held-out loss, base against tuned, and answers of either."""
