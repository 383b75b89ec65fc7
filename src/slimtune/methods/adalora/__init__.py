"""AdaLoRA: y = W x + b + s · B diag(E) A x, whose ranks move to the layers that need them.

A (r, in), E (r, 1), B (out, r), s = alpha / init_r: singular values E between singular vectors, which a regularization
loss, mean ‖P Pᵀ - I‖ over every A and Bᵀ, keeps nearly orthogonal. E starts at zero, so the model starts unchanged.
Parameters added per layer: init_r · (in + out + 1). Merged: W + s · B diag(E) A.

After each training step the ranks with the lowest scores, over all layers together, are set to zero:

    up to step tinit                none: n layers keep n · init_r ranks
    up to total_step - tfinal       every deltaT steps the budget falls, along a cubic curve, to n · target_r
    after it                        the pruned ranks stay pruned; before, a pruned rank can return

The score of a rank adds that of E's value and the means over A's row and B's column. The score of a value is
|parameter · gradient| smoothed with beta1, times its deviation smoothed with beta2.

Paper: https://arxiv.org/abs/2303.10512. File format: PEFT's `lora_A`, `lora_E`, `lora_B` of the kept ranks; the
config's `rank_pattern` says which ranks these are.
"""

from .adalora_config import AdaLoraConfig as AdaLoraConfig
