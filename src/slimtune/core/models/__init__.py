"""Loading a base: an alias, a folder, a Hub id or a file of another format; dtype and quantization.

Imports `adapters` and below. Start at `loader.py`; `base_config.py` answers without weights.
"""
