"""Several runs: compare methods fairly, tune settings, run on clusters, train several adapters on one base at once.

Imports the core, evaluation and planning. Start at `comparison.py`.
"""
