"""Whether an adapter is what was trained, and whether an engine applies it: `slimtune check`, for any trainer's file.

Imports the core, planning and export. Start at `check_adapter.py`; `adapter_findings.py` lists what can be wrong.
"""
