"""From rows to packed micro-batches: open a file, render by the chat template, mask, tokenize, pack.

Imports `adapters` and below, not `models`. Start at `row_files.py`, then `tokenize.py`, `packing.py`, `collator.py`.
"""
