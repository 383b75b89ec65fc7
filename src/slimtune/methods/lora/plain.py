"""The low-rank deltas: `y + s · B A x` at a linear map, `y + s · (B A)[:, x]` at an embedding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.base import AdapterModule, BaseForward, Site
from ...kernels.dropout import active_dropout_p, dropout
from ...kernels.lora_linear import plus_low_rank
from ...kernels.low_rank import add_low_rank
from .starts import fill, from_weight, is_in_weight, stacked


class LinearLora(AdapterModule):
    """`y + s · B A dropout(x)` for a linear map; with a start taken from the weight `y + s · (B A − B₀ A₀) …`."""

    optional: ClassVar[frozenset[str]] = frozenset({"start_A", "start_B"})
    """PEFT's files do not have them: they are found again from the base."""
    start_A: Tensor
    start_B: Tensor

    def __init__(self, site: Site, config: Any, r: int, scale: float) -> None:
        super().__init__()
        self.scale, self.init, self.lr_ratio = scale, config.init_lora_weights, config.lr_ratio
        self.lora_dropout = dropout(config.lora_dropout)
        # Made and filled in PEFT's order, so that one seed gives the same adapter in both.
        self.lora_A = nn.Linear(site.in_features, r, bias=False, device=site.init_device)
        self.lora_B = nn.Linear(r, site.out_features, bias=config.lora_bias, device=site.init_device)
        fill(self.init, self.lora_A, self.lora_B)
        self.to(site.device, site.dtype)
        self.fixed = {"lora_A.weight"} if config.freeze_a else {"lora_B.weight"} if self.init == "mica" else set()
        for name in self.fixed:
            self.get_parameter(name).requires_grad_(False)
        if is_in_weight(self.init) or self.init == "mica":
            if not site.loading and site.device.type != "meta":
                self._start(*from_weight(str(self.init), site, r, scale))
            if self.init != "mica":
                self.register_buffer("start_A", self.lora_A.weight.detach().clone())
                self.register_buffer("start_B", self.lora_B.weight.detach().clone())

    @torch.no_grad()
    def _start(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.weight.copy_(A)
        self.lora_B.weight.copy_(B)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return `A` and `B` of the whole update; of rank 2r where the start is taken out."""
        A, B = self.lora_A.weight, self.lora_B.weight
        return stacked(A, B, self.start_A, self.start_B) if "start_A" in self._buffers else (A, B)

    def forward_with_base(self, frozen: BaseForward, x: Tensor) -> Tensor:
        """Map `x (..., in)` to `(..., out)`; computes in x's dtype whatever the adapter is kept in."""
        A, B = self.low_rank()
        return self._biased(frozen.plus_low_rank(x, A, B, self.scale, active_dropout_p(self.lora_dropout)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)` and the frozen output `y (..., out)` to `(..., out)`."""
        A, B = self.low_rank()
        return self._biased(plus_low_rank(y, x, A, B, self.scale, active_dropout_p(self.lora_dropout)))

    def _biased(self, y: Tensor) -> Tensor:
        bias: Tensor | None = self.lora_B.bias
        return y if bias is None else y + bias.to(y.dtype) * self.scale

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A, B, scale)`: the update is `scale · B A`; None with a bias on B."""
        return (*self.low_rank(), self.scale) if self.lora_B.bias is None else None

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · B A` and the bias, plus `s · b_B` where B has one."""
        own: Tensor | None = self.lora_B.bias
        if own is not None:
            own = own.to(weight.dtype) * self.scale
            bias = own if bias is None else bias + own
        return add_low_rank(weight, *self.low_rank(), self.scale), bias

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Find the start again where the file does not have it: PEFT's files leave it in a changed base."""
        if "start_A" in self._buffers and "start_A" not in given:
            if "niter" in str(self.init):
                warnings.warn(
                    f"{site.name}: the file leaves out how this adapter started, which {self.init!r} found with random "
                    "numbers; found again it is a little different, in PEFT, too",
                    stacklevel=2,
                )
            A, B = from_weight(str(self.init), site, self.lora_A.out_features, self.scale)
            self.start_A.copy_(A)
            self.start_B.copy_(B)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Return what trains: all but a fixed A or B."""
        return [p for n, p in self.named_parameters() if n not in self.fixed]

    def lr_multipliers(self) -> dict[str, float]:
        """Return B's factor on the learning rate (LoRA+)."""
        return {n: self.lr_ratio for n, _ in self.named_parameters() if n.startswith("lora_B") and self.lr_ratio != 1}


class EmbeddingLora(AdapterModule):
    """`y + s · (B A)[:, x]` for an embedding whose rows `x` numbers; A starts at zero, B normal."""

    def __init__(self, site: Site, config: Any, r: int, scale: float) -> None:
        super().__init__()
        init = config.init_lora_weights
        self.scale, self.lr_ratio = scale, config.lr_ratio
        self.lora_embedding_A = nn.Parameter(torch.randn(r, site.in_features, device=site.init_device))
        self.lora_embedding_B = nn.Parameter(torch.randn(site.out_features, r, device=site.init_device))
        if init:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        self.to(site.device, site.dtype)
        # A file needs no start; the weight of an offloaded embedding could not be read here.
        if init == "mica" and not site.loading and site.device.type != "meta":
            with torch.no_grad():
                self.lora_embedding_B.copy_(from_weight("mica", site, r, scale)[1])
        self.fixed = {"lora_embedding_B"} if init == "mica" else set()
        for name in self.fixed:
            self.get_parameter(name).requires_grad_(False)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return `A (r, rows)` and `B (dim, r)`."""
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map row numbers `x (...)` and the frozen rows `y (..., dim)` to `(..., dim)`."""
        A, B = self.low_rank()
        return y + F.linear(F.embedding(x, A.t()), B).to(y.dtype) * self.scale

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A (r, rows), B (dim, r), scale)`."""
        return (*self.low_rank(), self.scale)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + s · B A` for `W (dim, rows)`."""
        return add_low_rank(weight, *self.low_rank(), self.scale), bias

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Return what trains: all but a fixed B."""
        return [p for n, p in self.named_parameters() if n not in self.fixed]

    def lr_multipliers(self) -> dict[str, float]:
        """Return B's factor on the learning rate (LoRA+)."""
        return {"lora_embedding_B": self.lr_ratio} if self.lr_ratio != 1 else {}
