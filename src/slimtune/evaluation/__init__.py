"""What a run learned: held-out loss, base against tuned, forgetting, answers; the data report and report.html.

Imports the core and generation. Start at `evaluate.py`.
"""
