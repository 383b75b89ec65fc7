"""Attention over packed sequences, and learned keys and values."""
