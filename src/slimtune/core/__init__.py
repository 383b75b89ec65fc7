"""What every maintainer knows: a base model, an adapter on it, rows, and the training loop.

    foundation → kernels → attention → adapters → data | models → config → training      imports go to the left only

It imports nothing around it: `slimtune/parts.py` registers the methods, objectives and other parts that it calls.
Start at `training/train.py` for a run, at `adapters/peft_model.py` for `get_peft_model`.
"""
