"""Full fine-tuning: every weight of the base trains.

    W' = round(M)        M: the adapter's own copy of W, fp32; the model computes with M rounded to the base's dtype

The copies are the fp32 masters that AdamW steps on: a step of 1e-5 on a weight of 1 is less than bf16 can represent,
and would be lost without them (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740). The base itself stays as it
is, so it can be compared with and comes back when the adapter is disabled. Weights that are tied in the base stay
tied. A 16-bit weight takes 2 + 4 (copy) + 4 (gradient) + 8 (AdamW) bytes per value, and 2 more while a step runs.

With `bf16_stochastic_round` the copies are in bf16, and a step's result is rounded up or down at random, so that small
steps are kept on average (extras/stochastic_rounding.py). With AdamW's states in 8 bits a weight takes
2 + 2 (copy) + 2 (gradient) + 2 (AdamW) bytes per value.

The file contains every weight whole, under the base's own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..core.adapters.config_fields import config_field
from ..core.adapters.peft_config import PeftConfig
from ..errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class FullConfig(PeftConfig):
    """Full fine-tuning: trains a copy of every weight of the base."""

    name: ClassVar = "full"
    exists_in_peft: ClassVar = False
    learning_rate: ClassVar = 5e-5
    kinds: ClassVar = ()
    trains_every_weight: ClassVar = True

    bf16_stochastic_round: bool = config_field(
        False, "train in bf16 a base in bf16, without fp32 copies; each step is rounded up or down at random"
    )

    @property
    def copies_in_fp32(self) -> bool:
        return not self.bf16_stochastic_round

    def check_model(self, model: nn.Module) -> None:
        import torch

        from ..core.kernels.linear_layers import is_quantized

        quantized = [name for name, module in model.named_modules() if is_quantized(module)]
        if quantized:
            message = f"full fine-tuning would train weights that are quantized, such as {quantized[0]}"
            raise UsageError(message, "a base in 16 or 32 bits", "--method lora, or --set model.quantization=null")
        dtypes = {p.dtype for p in model.parameters()}
        if self.bf16_stochastic_round and torch.bfloat16 not in dtypes:
            held = str(next(iter(dtypes), torch.float32)).removeprefix("torch.")
            message = f"method.bf16_stochastic_round trains weights in bfloat16, and this base's are in {held}"
            hint = "--dtype bfloat16, or --set method.bf16_stochastic_round=false"
            raise UsageError(message, "a base in bfloat16", hint)
