"""HF PEFT's names, module paths, layer classes and messages: code written for `peft` runs on slimtune.

Imports the core, methods and extras; the core reaches it by one hook. Start at `public_names.py`.
"""
