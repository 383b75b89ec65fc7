"""Make the adapter file that an engine reads rightly out of a file that `slimtune check` finds faults in.

Imports the core, the check and the exports. Start at `repair_adapter.py`; `adapter_mends.py` has one function a mend.
"""
