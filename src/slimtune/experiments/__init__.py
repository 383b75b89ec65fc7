"""Methods side by side: the same rows, the same budget, fair rates, and what the differences are worth."""
