"""Attention over packed sequences, and learned keys and values.

Imports `kernels` and below. Start at `packed_layout.py`: which tokens are whose; then `packed_attention.py`.
"""
