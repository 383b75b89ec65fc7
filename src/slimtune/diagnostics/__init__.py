"""What `slimtune doctor` looks at and `slimtune explain` knows.

Imports the core. `machine_facts.py` never judges, `machine_checks.py` never looks; `knowledge/` holds the pages,
`issue_trackers.py` where other programs collect reports of errors.
"""
