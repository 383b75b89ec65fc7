"""What prompt tuning, P-tuning, prefix tuning and LLaMA-Adapter share: learned positions in front of the sequence.

Imports the core. Start at the drawing in `prompt_modules.py`; `virtual_tokens.py` has one call of a backbone.
"""
