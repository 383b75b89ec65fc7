"""Bank: y' = y + g ⊙ (B A x), where A and B are trained and shared by all layers, and g is each layer's own gain.

A method for tests: its shared parameters train, those of VeRA are frozen.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from slimtune.core.adapters.adapter_module import AdapterModule, SharedParameterHolder
from slimtune.core.adapters.config_fields import config_field
from slimtune.core.adapters.peft_config import TargetedConfig


@dataclass
class BankConfig(TargetedConfig):
    """Bank: trained low-rank factors that all layers share."""

    name: ClassVar[str] = "bank"
    exists_in_peft: ClassVar[bool] = False
    recipe_defaults: ClassVar[dict] = {"target_modules": "all-linear"}

    r: int = config_field(4, "rank", ge=1)

    def extra_targets(self, model):
        from slimtune.extras.prompt_learning.prompt_modules import find_backbone_name

        return {find_backbone_name(model): "model"}

    def build_all(self, sites):
        layers = [s for s in sites if s.kind != "model"]
        (backbone,) = (s for s in sites if s.kind == "model")
        widest = max(s.in_features for s in layers), max(s.out_features for s in layers)
        bank = SharedFactors(backbone, self.r, *widest)
        return [bank if s.kind == "model" else LinearBank(s, bank) for s in sites]


class SharedFactors(SharedParameterHolder):
    def __init__(self, site, r, in_features, out_features):
        super().__init__()
        drawn = torch.randn(r, in_features, device=site.init_device) / in_features**0.5
        self.bank_A = nn.Parameter(drawn.to(site.device, site.dtype))
        self.bank_B = nn.Parameter(torch.zeros(out_features, r, device=site.device, dtype=site.dtype))


class LinearBank(AdapterModule):
    no_op_values: ClassVar[dict] = {"bank_gain": 0.0}

    def __init__(self, site, bank):
        super().__init__()
        self.shared, self.sizes = (bank,), (site.in_features, site.out_features)
        self.bank_gain = nn.Parameter(torch.ones(site.out_features, device=site.device, dtype=site.dtype))

    def forward(self, x, y):
        A, B, _ = self.low_rank_factors()
        return y + (x @ A.to(x.dtype).t() @ B.to(x.dtype).t()).to(y.dtype)

    def low_rank_factors(self):
        (bank,) = self.shared
        return bank.bank_A[:, : self.sizes[0]], self.bank_gain[:, None] * bank.bank_B[: self.sizes[1]], 1.0
