"""Files, devices, processes, text formatting, the registry of parts: no word of models or rows.

Imports only `slimtune.errors`. Start at `registry.py`, by which the core reaches the parts around it, and `files.py`.
"""
