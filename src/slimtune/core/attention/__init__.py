"""Attention over packed sequences.

Imports `kernels` and below. Start at `packed_layout.py`: which tokens are whose; then `packed_attention.py`.
"""
