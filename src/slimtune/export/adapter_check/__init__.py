"""Whether an adapter's file, of any trainer, is what was trained: the first half of `slimtune check` and `verify`.

Imports the core, planning and export. Start at `check_file.py`; `adapter_findings.py` lists what can be wrong.
"""
