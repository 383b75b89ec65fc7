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

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, BaseForward, Site
from ..core.adapters.architectures import DEFAULT_TARGETS
from ..core.adapters.peft_config import BIAS_HELP, FAN_IN_FAN_OUT_HELP, TargetedConfig, setting
from ..core.kernels.dropout import active_dropout_p, dropout
from ..core.kernels.linear_layers import layer_kind
from ..errors import ConfigError, PeftWarning
from .lora import LoraConfig

_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@dataclass
class AdaLoraConfig(TargetedConfig):
    """AdaLoRA: low-rank updates whose ranks are reallocated in training; PEFT's field names and defaults."""

    name: ClassVar = "adalora"
    prefix: ClassVar = "lora_"
    learning_rate: ClassVar = 5e-3
    kinds: ClassVar = ("linear", "conv")
    architecture_targets: ClassVar = DEFAULT_TARGETS | {
        **dict.fromkeys(("bart", "opt"), _ENCODER_TARGETS),
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }
    unsupported_peft_fields: ClassVar = {
        **LoraConfig.unsupported_peft_fields,
        **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"), False),
        **dict.fromkeys(
            ("trainable_token_indices", "alora_invocation_tokens", "eva_config", "corda_config", "lora_ga_config",
             "layer_replication")
        ),
        "loftq_config": {}, "alpha_pattern": {},
    }  # fmt: skip
    short_names: ClassVar = {
        "rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules",
    }  # fmt: skip
    recipe_defaults: ClassVar = {"lora_alpha": lambda g: 2 * g.get("init_r", 12), "target_modules": "all-linear"}
    training_written_fields: ClassVar = frozenset({"rank_pattern", "total_step"})

    target_r: int = setting(8, "average rank of a layer at the end", ge=1)
    init_r: int = setting(12, "rank each layer starts with, at least target_r; typically 1.5 times target_r", ge=1)
    tinit: int = setting(0, "steps before the first rank is pruned", ge=0)
    tfinal: int = setting(0, "steps at the end during which the ranks stay fixed", ge=0)
    deltaT: int = setting(1, "steps between two reallocations", ge=1)
    beta1: float = setting(0.85, "smoothing of the sensitivities", gt=0, lt=1)
    beta2: float = setting(0.85, "smoothing of their deviations", gt=0, lt=1)
    orth_reg_weight: float = setting(0.5, "factor of the regularization loss", ge=0)
    total_step: int | None = setting(
        None, "optimizer steps of the whole training; None: slimtune train fills it in", ge=1
    )
    rank_pattern: dict[str, list[bool]] | None = setting(None, "which ranks each layer keeps; training writes it")
    lora_alpha: float = setting(8, "scale numerator: the update is scaled by lora_alpha / init_r", gt=0)
    lora_dropout: float = setting(0.0, "probability of dropping an input of A while training", ge=0, lt=1)
    fan_in_fan_out: bool = setting(False, FAN_IN_FAN_OUT_HELP)
    bias: Literal["none", "all", "lora_only"] = setting("none", BIAS_HELP)
    init_lora_weights: bool = setting(True, "True: A and B normal with std 0.02, E zero; False: all random, for tests")
    r: int = setting(8, "not used, as in PEFT: init_r is the rank")

    def check(self) -> None:
        super().check()
        self.rank_pattern = self.rank_pattern or None
        self.require(self.init_r >= self.target_r, "init_r", f"at least target_r ({self.target_r})")
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            message = f"The supplied schedule values don't allow for a budgeting phase: total_step is {self.total_step}"
            raise ConfigError(message, f"above tinit + tfinal ({self.tinit} + {self.tfinal})")
        if self.r != 8:
            text = (
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, use"
            )
            warnings.warn(f"{text} `init_r` instead.", PeftWarning, stacklevel=4)

    def build(self, site: Site) -> AdapterModule:
        """Return the adapter module at `site`; when loading a file, with the ranks that it keeps."""
        kept = (self.rank_pattern or {}).get(f"{site.name}.lora_E") if site.loading else None
        if site.kind == "conv":
            site.require_ungrouped("AdaLoRA")
        return LinearAdaLora(site, self, self.init_r if kept is None else sum(kept))

    def max_added_bytes(self, adapter_modules: Mapping[str, AdapterModule]) -> int:
        return 0  # training only removes ranks

    def on_train_begin(self, total_steps: int) -> None:
        """Fill in the number of steps if none is given."""
        if self.total_step is None:
            self.total_step = total_steps
            self.check()

    def on_step_end(self, adapter_modules: Mapping[str, AdapterModule], step: int) -> None:
        """Update the scores from this step's gradients, and set the ranks beyond the budget to zero."""
        if self.total_step is None:
            raise ConfigError("total_step is None", "the steps of the whole training", "AdaLoraConfig(total_step=…)")
        modules: list[Any] = list(adapter_modules.values())
        last = self.total_step - self.tfinal
        for module in modules:
            if step < last:
                module.update_averages(self.beta1, self.beta2)
            elif step > last:
                module.zero_pruned_ranks()
        if step == last or (self.tinit < step < last and step % self.deltaT == 0):
            self._allocate_ranks(modules, 1 - (step - self.tinit) / (last - self.tinit))
        if step == last:
            for module in modules:
                module.averages.clear()

    def _allocate_ranks(self, modules: list[Any], remaining: float) -> None:
        """Keep the ranks with the highest scores over all layers, as many as the budget allows.

        `remaining` is the part of the pruning steps that is left, 1 to 0.
        """
        if not all(module.averages for module in modules):
            return  # there are no scores yet
        scores = [module.rank_scores() for module in modules]
        all_scores = torch.cat([s.to(scores[0].device) for s in scores])
        target = self.target_r * len(modules)
        surplus = len(all_scores) - int((len(all_scores) - target) * remaining**3 + target)
        if surplus < 1:
            return
        threshold = all_scores.kthvalue(surplus).values
        for module, own in zip(modules, scores, strict=True):
            module.kept_ranks = own > threshold.to(own.device)
            module.zero_pruned_ranks()
        self.rank_pattern = {m.pattern_key: m.kept_ranks.tolist() for m in modules}

    def regularization_loss(self, adapter_modules: Mapping[str, AdapterModule]) -> Tensor | None:
        """Return orth_reg_weight · mean ‖P Pᵀ - I‖ (Frobenius) over every A and Bᵀ."""
        if not self.orth_reg_weight or not adapter_modules:
            return None
        modules: list[Any] = list(adapter_modules.values())
        sides = [P for m in modules for P in (m.lora_A, m.lora_B.t())]
        norms = [torch.linalg.matrix_norm(P @ P.t() - torch.eye(len(P)).to(P)) for P in sides]
        return self.orth_reg_weight * torch.stack([n.to(norms[0].device) for n in norms]).mean()


class LinearAdaLora(AdapterModule):
    """`y + s · B diag(E) A dropout(x)` for a linear layer, or for a convolution with the matrix B diag(E) A.

    Besides its parameters it has `kept_ranks`, the ranks that the last reallocation kept (None: all), and `averages`,
    the smoothed sensitivities and deviations of each parameter. Files contain the kept ranks only.
    """

    neutral: ClassVar = {"lora_E": 0.0}

    _NAMES = ("lora_A", "lora_E", "lora_B")

    def __init__(self, site: Site, config: Any, r: int) -> None:
        super().__init__()
        # PEFT's divisor; by the rank a layer starts with, not the rank it keeps.
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.config, self.pattern_key = config, f"{site.name}.lora_E"
        self.lora_dropout = dropout(config.lora_dropout)
        # In PEFT's order: one seed gives the same adapter in both libraries.
        self.lora_A = nn.Parameter(torch.randn(r, site.in_features, device=site.init_device))
        self.lora_E = nn.Parameter(torch.randn(r, 1, device=site.init_device))
        self.lora_B = nn.Parameter(torch.randn(site.out_features, r, device=site.init_device))
        torch.randn(1, device=site.init_device)  # PEFT also draws its count of ranks
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
        self.to(site.device, site.dtype)
        self.kept_ranks: Tensor | None = None
        self.averages: dict[str, Tensor] = {}

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        if layer_kind(base.module) == "conv":
            A, B, scale = self.low_rank_factors()
            return base(x) + base.convolve(self.lora_dropout(x), (B @ A).to(x.dtype)) * scale
        return base.plus_low_rank(x, *self.low_rank_factors(), active_dropout_p(self.lora_dropout))

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return `(diag(E) A (r, in), B (out, r), scale)`."""
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    @torch.no_grad()
    def update_averages(self, beta1: float, beta2: float) -> None:
        """Smooth each value's sensitivity |parameter · gradient| and its deviation from the average."""
        for name, p in self.named_parameters():
            sensitivity = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
            mean = self.averages.setdefault(f"{name}.mean", torch.zeros_like(p))
            deviation = self.averages.setdefault(f"{name}.spread", torch.zeros_like(p))
            mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
            deviation.mul_(beta2).add_((sensitivity - mean).abs(), alpha=1 - beta2)

    def rank_scores(self) -> Tensor:
        """Return each rank's score `(r)`."""
        A, E, B = (self.averages[f"{n}.mean"] * self.averages[f"{n}.spread"] for n in self._NAMES)
        return E[:, 0] + (A.mean(1) + B.mean(0))

    @torch.no_grad()
    def zero_pruned_ranks(self) -> None:
        if self.kept_ranks is not None:
            self.lora_E.masked_fill_(~self.kept_ranks.to(self.lora_E.device)[:, None], 0)

    def tensors(self) -> dict[str, Tensor]:
        if self.kept_ranks is None:
            return super().tensors()
        kept = self.kept_ranks.to(self.lora_A.device)
        return {"lora_A": self.lora_A[kept], "lora_E": self.lora_E[kept], "lora_B": self.lora_B[:, kept]}

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: Site) -> None:
        """Change to the file's number of ranks."""
        if not all(n in state_dict and state_dict[n].dim() == 2 for n in ("lora_A", "lora_E", "lora_B")):
            return
        if not len(state_dict["lora_A"]) == len(state_dict["lora_E"]) == state_dict["lora_B"].shape[1]:
            return  # the comparison of shapes names them
        self.kept_ranks = None
        self.averages.clear()
        rank, max_rank = len(state_dict["lora_A"]), self.config.init_r
        if rank != len(self.lora_A) and rank <= max_rank:
            self._replace_parameters(state_dict)
        noted = (self.config.rank_pattern or {}).get(self.pattern_key, [True] * max_rank)
        if rank != sum(noted):
            self._note_kept_ranks([i < rank for i in range(max_rank)])

    def extra_state(self) -> dict[str, Tensor]:
        """Return what training needs besides the file: all ranks, which are kept, and the averages."""
        parameters, kept, averages = dict(self.named_parameters()), self.kept_ranks, self.averages
        if self.lora_A.is_meta:
            kept = torch.empty(len(self.lora_A), dtype=torch.bool, device="meta")
            averages = {f"{n}.{what}": p for n, p in parameters.items() for what in ("mean", "spread")}
        return dict(averages) if kept is None else {**parameters, "left": kept, **averages}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        device = self.lora_A.device
        self._replace_parameters(state)
        self.averages = {n: t.to(device) for n, t in state.items() if n.endswith((".mean", ".spread"))}
        if "left" in state:
            self.kept_ranks = state["left"].to(device)
            self._note_kept_ranks(self.kept_ranks.tolist())

    def _note_kept_ranks(self, kept: list[bool]) -> None:
        self.config.rank_pattern = {**(self.config.rank_pattern or {}), self.pattern_key: kept}

    def _replace_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name in [n for n in self._NAMES if n in values]:
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(values[name].to(old.device, old.dtype, copy=True), old.requires_grad))
