"""One training run, from recipe to adapter: the step, the loop, checkpoints, recovery from running out of memory.

Imports all of the core below. Start at `train.py`, which reads top to bottom; then `training_loop.py` and `loss.py`.
"""
