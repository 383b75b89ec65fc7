"""Full fine-tuning: every weight of the base trains.

    W' = round(M)        M: the adapter's own copy of W, fp32; the model computes with M rounded to the base's dtype

The copies are the fp32 masters that AdamW steps on: a step of 1e-5 on a weight of 1 is less than bf16 can represent,
and would be lost without them (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740). The base itself stays as it
is, so it can be compared with and comes back when the adapter is disabled. Weights that are tied in the base stay
tied. A 16-bit weight takes 2 + 4 (copy) + 4 (gradient) + 8 (AdamW) bytes per value, and 2 more while a step runs.

The file contains every weight whole, under the base's own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.adapters.peft_config import PeftConfig
from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class FullConfig(PeftConfig):
    """Full fine-tuning: trains a copy of every weight of the base. It has no settings of its own."""

    name: ClassVar = "full"
    exists_in_peft: ClassVar = False
    learning_rate: ClassVar = 5e-5
    kinds: ClassVar = ()
    trains_every_weight: ClassVar = True

    def check_model(self, model: nn.Module) -> None:
        from ..core.kernels.linear_layers import is_quantized

        quantized = [name for name, module in model.named_modules() if is_quantized(module)]
        if quantized:
            message = f"full fine-tuning would train weights that are quantized, such as {quantized[0]}"
            raise UsageError(message, "a base in 16 or 32 bits", "--method lora, or --set model.quantization=null")
