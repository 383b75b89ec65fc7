"""Tensor code: LoRA linear, cross-entropy, tiled MLP, dropout, activation memory.

Imports `foundation`. Start at `lora_linear.py`; each file names its formula at the top.
"""
