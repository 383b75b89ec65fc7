"""Recipes from the configs of other trainers: `slimtune import`. One trainer, one file; start at `import_config.py`."""
