"""What leaves the house: base and adapter as one checkpoint, proven against the adapter."""
