"""The objectives: one file is one objective, and the file's name is what `task` in a recipe says.

    rows of a step ─▶ one forward pass ─▶ −log p of each supervised token ─▶ `Objective.loss`

An objective sees numbers of rows, never a model, so every objective trains with the same packed step, memory recovery,
plan and checkpoints. `core/training/objective.py` says what an objective is made of.
"""
