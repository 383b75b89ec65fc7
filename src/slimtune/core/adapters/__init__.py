"""What a method is made of, and an adapter on a model: configs, adapted layers, PeftModel, PEFT's files.

Imports `attention` and below. Start at the table in `adapter_module.py`, then `adapted_layer.py`, `peft_model.py`.
"""
