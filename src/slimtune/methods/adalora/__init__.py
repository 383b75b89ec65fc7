"""AdaLoRA: y = W x + b + s · B diag(E) A x, whose ranks move to the layers that need them.

A (r, in), E (r, 1), B (out, r), s = alpha / init_r: singular values E between singular vectors, which a penalty on the
loss, mean ‖P Pᵀ - I‖ over every A and Bᵀ, keeps near to orthogonal. E starts at zero, so the model starts unchanged.
Parameters added per layer: init_r · (in + out + 1). Merged: W + s · B diag(E) A.

Training has three parts, and after each step ranks with a low score are put to zero, over all layers together:

    up to tinit                    none: n · init_r ranks in n layers
    up to total_step - tfinal      every deltaT steps the budget sinks, as a cube, to n · target_r
    after it                       the ranks that are out stay out

Score of a rank: that of E's value and the means of A's row and B's column, of |parameter · gradient| smoothed with
beta1, times its smoothed deviation (beta2). A rank that is out can come back in the middle part.

Paper: https://arxiv.org/abs/2303.10512. File format: PEFT's `lora_A`, `lora_E`, `lora_B`, with the ranks that are left,
and which these are in the config's `rank_pattern`.

`layer.py` holds the delta, with its scores and its ranks in files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...adapters.architectures import DEFAULT_TARGETS
from ...adapters.base import AdapterModule, Site
from ...adapters.config import TargetedConfig
from ...errors import ConfigError
from ..lora import LoraConfig
from .layer import LinearAdaLora, skewness

_WIDER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
_TARGETS = DEFAULT_TARGETS | {
    **dict.fromkeys(("bart", "opt"), _WIDER),
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
}


@dataclass
class AdaLoraConfig(TargetedConfig):
    """AdaLoRA: low-rank updates whose ranks are shared out while training; PEFT's field names and defaults.

    Args:
        target_r: ranks a layer has on average in the end, 1 and up.
        init_r: ranks each layer starts with, target_r and up; typically 1.5 times as many.
        tinit: steps before the first rank goes, 0 and up.
        tfinal: steps at the end in which the ranks stay, 0 and up.
        deltaT: steps between two allocations, 1 and up.
        beta1: smoothing of the sensitivities, above 0 and below 1.
        beta2: smoothing of their deviations, above 0 and below 1.
        orth_reg_weight: factor of the penalty on the loss, 0 and up.
        total_step: optimizer steps of the whole training, above tinit + tfinal; `slimtune train` fills it in.
        rank_pattern: which ranks are left, by layer; written by training.
        lora_alpha: scale numerator, above 0; the update is scaled by lora_alpha / init_r.
        lora_dropout: probability in [0, 1) of dropping an input of A while training.
        fan_in_fan_out: the base stores its weights as (in, out); known by itself for GPT-2's Conv1D.
        bias: which biases of the base train too: "none", "lora_only" (of adapted layers) or "all".
        init_lora_weights: True: normal A and B with std 0.02, zero E; False: all normal with std 1, for tests.
        r: not used, as in PEFT: init_r is the rank.
    """

    name: ClassVar[str] = "adalora"
    learning_rate: ClassVar[float] = 5e-3
    unsupported_peft_fields: ClassVar[dict[str, Any]] = {
        **LoraConfig.unsupported_peft_fields,
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias"), False),
        **dict.fromkeys(("trainable_token_indices", "eva_config")),
        "loftq_config": {},
        "alpha_pattern": {},
    }
    short_names: ClassVar[dict[str, str]] = {
        "rank": "init_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "target_modules",
    }
    recipe_defaults: ClassVar[dict[str, Any]] = {
        "lora_alpha": lambda given: 2 * given.get("init_r", 12),
        "target_modules": "all-linear",
    }
    training_written_fields: ClassVar[frozenset[str]] = frozenset({"rank_pattern", "total_step"})

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool = True
    r: int = 8

    @classmethod
    def targets_by_architecture(cls) -> Mapping[str | None, list[str]]:
        """Return the default targets by `model_type`: LoRA's, more in some encoders."""
        return _TARGETS

    def check(self) -> None:
        """Check ranges, and that the schedule has a part in which ranks go."""
        super().check()
        self.rank_pattern = self.rank_pattern or None
        for name, least in (("target_r", 1), ("init_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            self.require_whole(name, least)
        self.require(self.init_r >= self.target_r, "init_r", f"target_r ({self.target_r}) and up")
        for name in ("beta1", "beta2"):
            self.require(0 < getattr(self, name) < 1, name, "above 0 and below 1")
        self.require(self.orth_reg_weight >= 0, "orth_reg_weight", "0 and up")
        self.require_above_zero("lora_alpha")
        self.require_share("lora_dropout")
        self.require(self.bias in ("none", "all", "lora_only"), "bias", "'none', 'all' or 'lora_only'")
        self.require(self.init_lora_weights in (True, False), "init_lora_weights", "True or False")
        room = self.total_step is None or self.tinit < self.total_step - self.tfinal
        self.require(room, "total_step", f"above tinit + tfinal ({self.tinit} + {self.tfinal})")
        if self.r != 8:
            warnings.warn(f"AdaLoRA does not use r (given {self.r}): init_r is the rank", stacklevel=4)

    def build(self, site: Site) -> AdapterModule:
        """Return the delta at `site`; for a file's tensors with the ranks that are left."""
        left = (self.rank_pattern or {}).get(f"{site.name}.lora_E") if site.loading else None
        return LinearAdaLora(site, self, self.init_r if left is None else sum(left))

    def max_size_increase(self, deltas: Mapping[str, AdapterModule]) -> int:
        """Return 0: training only takes ranks away."""
        return 0

    def on_train_begin(self, total_steps: int) -> None:
        """Take the run's number of steps where none is given."""
        if self.total_step is None:
            self.total_step = total_steps
            self.check()

    def on_step_end(self, deltas: Mapping[str, AdapterModule], step: int) -> None:
        """Score the ranks by the step's gradients, and put those beyond the budget to zero."""
        if self.total_step is None:
            raise ConfigError("total_step is None", "the steps of the whole training", "AdaLoraConfig(total_step=…)")
        own: dict[str, Any] = dict(deltas)
        last = self.total_step - self.tfinal
        if step > last:
            for delta in own.values():
                delta.drop()
            return
        if step < last:
            for delta in own.values():
                delta.observe(self.beta1, self.beta2)
        if step == last or (step > self.tinit and step % self.deltaT == 0):
            self._allocate(own, step)
        if step == last:
            for delta in own.values():
                delta.averages.clear()

    def _allocate(self, deltas: dict[str, Any], step: int) -> None:
        """Keep the ranks with the highest scores over all layers, as many as the budget allows."""
        if not all(delta.averages for delta in deltas.values()):
            return  # nothing was seen yet
        scores = {name: delta.scores() for name, delta in deltas.items()}
        device = next(iter(scores.values())).device
        every = torch.cat([s.to(device) for s in scores.values()])
        target = self.target_r * len(deltas)
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)  # type: ignore[operator]
        surplus = len(every) - int((len(every) - target) * left**3 + target)
        if surplus < 1:
            return
        threshold = every.kthvalue(surplus).values
        for name, delta in deltas.items():
            delta.left = scores[name] > threshold.to(scores[name].device)
            delta.drop()
        which = iter((every > threshold).tolist())
        self.rank_pattern = {delta.at: [next(which) for _ in delta.left] for delta in deltas.values()}

    def regularization_loss(self, deltas: Mapping[str, AdapterModule]) -> Tensor | None:
        """Return orth_reg_weight · mean ‖P Pᵀ - I‖ (Frobenius) over every A and Bᵀ."""
        if not self.orth_reg_weight or not deltas:
            return None
        own: list[Any] = list(deltas.values())
        norms = [skewness(P) for delta in own for P in (delta.lora_A, delta.lora_B.t())]
        return self.orth_reg_weight * torch.stack([n.to(norms[0].device) for n in norms]).mean()
