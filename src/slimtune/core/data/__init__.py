"""From rows to packed micro-batches: render by the chat template, mask, tokenize, pack.

Imports `adapters` and below, not `models`. Start at `rows.py`, then `tokenize.py`, `packing.py`, `collator.py`.
"""
