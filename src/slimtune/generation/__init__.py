"""One text generator: prompts and batches through a model or an engine, with an adapter for each row.

Imports the core. Start at `continuous_batching.py`.
"""
