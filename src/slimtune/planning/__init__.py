"""Whether a job will run, before a weight is loaded: the real step on tensors that have shapes and no values.

Imports the core. Start at `planner.py`; `memory_trace.py` runs the step, `plan_result.py` is what comes out.
"""
