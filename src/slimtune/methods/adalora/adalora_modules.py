"""AdaLoRA's adapter modules."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.kernels.dropout import get_active_dropout_probability, make_dropout
from ...core.kernels.linear_layers import get_base_layer_type


class LinearAdaLora(AdapterModule):
    """`y + s · B diag(E) A dropout(x)` for a linear layer, or for a convolution with the matrix B diag(E) A.

    Besides its parameters it has `kept_ranks`, the ranks that the last reallocation kept (None: all), and `averages`,
    the smoothed sensitivities and deviations of each parameter. Files contain the kept ranks only.
    """

    no_op_values: ClassVar = {"lora_E": 0.0}

    _NAMES = ("lora_A", "lora_E", "lora_B")

    def __init__(self, site: AdapterSite, config: Any, r: int) -> None:
        super().__init__()
        # PEFT's divisor; by the rank a layer starts with, not the rank it keeps.
        self.scale = config.lora_alpha / (config.init_r + 1e-5)
        self.config, self.pattern_key = config, f"{site.name}.lora_E"
        self.lora_dropout = make_dropout(config.lora_dropout)
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
        if get_base_layer_type(base.module) == "conv":
            A, B, scale = self.low_rank_factors()
            return base(x) + base.convolve(self.lora_dropout(x), (B @ A).to(x.dtype)) * scale
        return base.plus_low_rank(x, *self.low_rank_factors(), get_active_dropout_probability(self.lora_dropout))

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

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: AdapterSite) -> None:
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


def allocate_ranks(config: Any, modules: list[Any], remaining_steps_fraction: float) -> None:
    """Keep the ranks with the highest scores over all layers, as many as the budget allows.

    `remaining_steps_fraction` is the part of the pruning steps that is left, 1 to 0.
    """
    if not all(module.averages for module in modules):
        return  # there are no scores yet
    scores = [module.rank_scores() for module in modules]
    all_scores = torch.cat([s.to(scores[0].device) for s in scores])
    target = config.target_r * len(modules)
    surplus = len(all_scores) - int((len(all_scores) - target) * remaining_steps_fraction**3 + target)
    if surplus < 1:
        return
    threshold = all_scores.kthvalue(surplus).values
    for module, own in zip(modules, scores, strict=True):
        module.kept_ranks = own > threshold.to(own.device)
        module.zero_pruned_ranks()
    config.rank_pattern = {m.pattern_key: m.kept_ranks.tolist() for m in modules}


def compute_mean_orthogonality_norm(modules: list[Any]) -> Tensor:
    """Return the mean of ‖P Pᵀ - I‖ (Frobenius) over every A and Bᵀ, a scalar."""
    sides = [P for m in modules for P in (m.lora_A, m.lora_B.t())]
    norms = [torch.linalg.matrix_norm(P @ P.t() - torch.eye(len(P)).to(P)) for P in sides]
    return torch.stack([n.to(norms[0].device) for n in norms]).mean()
