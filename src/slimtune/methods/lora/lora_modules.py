"""LoRA at one layer: linear layers, embeddings, modules tied to the embedding, weights of nn.MultiheadAttention.

    linear layer                y + s · B A x                A (r, in), B (out, r)
    embedding                   y + s · (B A)[:, x]          A (r, rows), B (dim, r)
    tied embedding              the same A and B             with `ensure_weight_tying`
    tied linear layer           its A is Bᵀ (r, dim), its B is Aᵀ (rows, r)
    in_proj_weight, out_proj    W + n · s · B A              PyTorch reads both without calling a module

One pair of matrices gets the gradients of all tied modules, and they stay tied after a merge. (PEFT makes two
parameters that share memory, so that an optimizer moves it twice.) File format: PEFT's, a copy under each tied
module's name; keys of out_proj have one more name, `base_layer`.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.kernels.dropout import get_active_dropout_probability, make_dropout
from ...core.kernels.lora_linear import add_low_rank_to_weight
from ...errors import AdapterError, ConfigError
from .init_configs import is_init_subtracted_from_base
from .lora_init import initialize_lora_factors, make_lora_a_and_b_from_base


class LoraModuleBase(AdapterModule):
    """What LoRA at linear layers and at embeddings shares."""

    peft_values: ClassVar = {"r": "r", "lora_alpha": "lora_alpha", "scaling": "scale"}
    groups: int = 1
    """Groups of the base, a convolution: each has its own part of the rank."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__()
        self.scale, self.init, self.lr_ratio = scale, config.init_lora_weights, config.lr_ratio
        self.initial_scale, self.lora_alpha = scale, config.get_alpha(site.name)

    @property
    def r(self) -> int:
        """The rank of A and B."""
        return next(p.shape[0] for n, p in self.named_parameters() if n.endswith(("lora_A.weight", "embedding_A")))

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return `A (r, in)` and `B (out, r)` of the whole update."""
        raise NotImplementedError

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self.low_rank(), self.scale)

    def add_bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the base's bias plus `s` times B's, in `dtype`; without a bias on B the same object."""
        own: Tensor | None = self.lora_B.bias  # type: ignore[union-attr, assignment]
        if own is None:
            return bias
        added = own.to(dtype) * self.scale
        return added if bias is None else bias + added

    def tensors_of_rank(self, rank: int, scale: float | None = None) -> dict[str, Tensor]:
        """Return the tensors of a file for the whole update as one product, without its start.

        Rank and scale are those of the module with these tensors; no scale: that of this module.
        """
        tensors = {n: t for n, t in self.tensors().items() if not n.startswith("start_")}
        if "start_A" in self._buffers:
            tensors |= dict(zip(("lora_A.weight", "lora_B.weight"), self.low_rank(), strict=True))
        ratio, group_rank = 1 if scale is None else self.scale / scale, rank // self.groups
        for name, t in tensors.items():
            if name in ("lora_A.weight", "lora_embedding_A"):
                parts = t.unflatten(0, (self.groups, -1))
                added = t.new_zeros(self.groups, group_rank - parts.shape[1], *t.shape[1:])
                tensors[name] = torch.cat([parts, added], dim=1).flatten(0, 1)
            elif name in ("lora_B.weight", "lora_embedding_B"):
                added = t.new_zeros(len(t), group_rank - t.shape[1], *t.shape[2:])
                tensors[name] = torch.cat([t, added], dim=1) * ratio
            elif name == "lora_B.bias":
                tensors[name] = t * ratio
        return tensors

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor | float]:
        names = ("lora_B.weight", "lora_B.bias", "start_B", "lora_embedding_A")
        return {n: 0.0 for n, _ in (*self.named_parameters(), *self.named_buffers()) if n.endswith(names)}

    def lr_multipliers(self) -> dict[str, float]:
        """Return B's factor on the learning rate (LoRA+)."""
        return {n: self.lr_ratio for n, _ in self.named_parameters() if "_B" in n}

    def freeze_parameter(self, parameter_name: str) -> None:
        self.frozen_names = (parameter_name,)
        self.get_parameter(parameter_name).requires_grad_(False)


class LinearLora(LoraModuleBase):
    """`y + s · B A dropout(x)` for a linear layer; with a subtracted start `y + s · (B A − B₀ A₀) dropout(x)`."""

    optional: ClassVar[frozenset[str]] = frozenset({"start_A", "start_B"})
    """A₀ and B₀. PEFT's files lack them: they are computed from the base again."""
    start_A: Tensor
    start_B: Tensor

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self.lora_dropout = make_dropout(config.lora_dropout)
        # In PEFT's order: one seed gives the same adapter in both libraries.
        self.lora_A = nn.Linear(site.in_features, r, bias=False, device=site.init_device)
        self.lora_B = nn.Linear(r, site.out_features, bias=config.lora_bias, device=site.init_device)
        initialize_lora_factors(self.init, self.lora_A, self.lora_B)
        self.to(site.device, site.dtype)
        if config.freeze_a or self.init == "mica":
            self.freeze_parameter("lora_A.weight" if config.freeze_a else "lora_B.weight")
        if (is_init_subtracted_from_base(self.init) or self.init == "mica") and not site.skip_init:
            A, B = make_lora_a_and_b_from_base(self.init, site, r, scale, config.lora_ga_config)
            self.lora_A.weight.data.copy_(A)
            self.lora_B.weight.data.copy_(B)
        if is_init_subtracted_from_base(self.init):
            self.register_buffer("start_A", self.lora_A.weight.detach().clone())
            self.register_buffer("start_B", self.lora_B.weight.detach().clone())

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return `A` and `B` of the whole update; with a subtracted start of rank 2r, see `lora_init.py`."""
        A, B = self.lora_A.weight, self.lora_B.weight
        if "start_A" not in self._buffers:
            return A, B
        return torch.cat([A, A - self.start_A]), torch.cat([B - self.start_B, self.start_B], dim=1)

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        A, B = self.low_rank()
        y = base.plus_low_rank(x, A, B, self.scale, get_active_dropout_probability(self.lora_dropout))
        bias: Tensor | None = self.lora_B.bias
        return y if bias is None else y + bias.to(y.dtype) * self.scale

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return `(A, B, scale)`; None with a bias on B."""
        return super().low_rank_factors() if self.lora_B.bias is None else None

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return add_low_rank_to_weight(weight, *self.low_rank(), self.scale), self.add_bias(bias, weight.dtype)

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: AdapterSite) -> None:
        """Compute A₀ and B₀ from the base where the file lacks them: PEFT's files rely on a changed base instead."""
        if "start_A" in self._buffers and "start_A" not in state_dict:
            if self.init == "lora_ga":
                message = f"{site.name}: the file lacks the start of this adapter, which was made from gradients"
                hint = "save_pretrained(…, path_initial_model_for_weight_conversion=…) where it was trained"
                raise AdapterError(message, hint=hint)
            if "niter" in self.init:
                warnings.warn(
                    f"{site.name}: the file lacks the start of this adapter, which {self.init!r} computed with random "
                    "numbers; computed again, in PEFT as well, it differs a little",
                    stacklevel=2,
                )
            A, B = make_lora_a_and_b_from_base(self.init, site, self.lora_A.out_features, self.scale)
            self.start_A.copy_(A)
            self.start_B.copy_(B)


class EmbeddingLora(LoraModuleBase):
    """`y + s · (B A)[:, x]` for an embedding, `x (...)` being token ids; A starts at zero, B normal."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        super().__init__(site, config, r, scale)
        self.lora_embedding_A = nn.Parameter(torch.randn(r, site.in_features, device=site.init_device))
        self.lora_embedding_B = nn.Parameter(torch.randn(site.out_features, r, device=site.init_device))
        if self.init:
            nn.init.zeros_(self.lora_embedding_A)
            nn.init.normal_(self.lora_embedding_B)
        self.to(site.device, site.dtype)
        if self.init == "mica":
            self.freeze_parameter("lora_embedding_B")
            # Loading a file needs no start, and could not read the weight of an offloaded embedding here.
            if not site.skip_init:
                self.lora_embedding_B.data.copy_(make_lora_a_and_b_from_base("mica", site, r, scale)[1])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = self.low_rank()
        return y + F.linear(F.embedding(x, A.t()), B).to(y.dtype) * self.scale


class _TiedLora(LoraModuleBase):
    """What both kinds of tied modules share: no parameters of their own, and the embedding's module, their owner."""

    def __init__(self, site: AdapterSite, config: Any, owner: EmbeddingLora) -> None:
        super().__init__(site, config, owner.r, owner.scale)
        self.shared = (owner,)  # a tuple, so that PyTorch registers its parameters once

    @property
    def owner(self) -> EmbeddingLora:
        return self.shared[0]

    @property
    def r(self) -> int:
        return self.owner.r


class TiedLinearLora(_TiedLora):
    """`y + s · Aᵀ Bᵀ dropout(x)` with the embedding's A and B, for a linear layer whose weight is the embedding's."""

    peft_values: ClassVar = {**_TiedLora.peft_values, "lora_A": "lora_A", "lora_B": "lora_B"}
    peft_modules: ClassVar[Collection[str]] = ("lora_A", "lora_B")
    lora_A = property(lambda self: self.owner.lora_embedding_B.t())
    lora_B = property(lambda self: self.owner.lora_embedding_A.t())

    def __init__(self, site: AdapterSite, config: Any, owner: EmbeddingLora) -> None:
        super().__init__(site, config, owner)
        self.lora_dropout = make_dropout(config.lora_dropout)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        return base.plus_low_rank(
            x, self.lora_A, self.lora_B, self.scale, get_active_dropout_probability(self.lora_dropout)
        )

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The product of the embedding, so that both round to the same weight.
        return add_low_rank_to_weight(weight.t(), *self.owner.low_rank(), self.scale).t(), bias

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


class TiedSecondInputEmbeddingLora(_TiedLora):
    """An embedding with the update of the input embedding."""

    peft_values: ClassVar = _TiedLora.peft_values | {n: n for n in ("lora_embedding_A", "lora_embedding_B")}
    lora_embedding_A = property(lambda self: self.owner.lora_embedding_A)
    lora_embedding_B = property(lambda self: self.owner.lora_embedding_B)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return self.owner.low_rank()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.owner.forward(x, y)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_embedding_A, "lora_embedding_B": self.lora_embedding_B}


class AttentionWeightLora(LinearLora):
    """`W + n · s · B A` for one of the two weights of an nn.MultiheadAttention that are read without a call."""

    times: int = 1
    """n. PEFT adds the update of out_proj twice, in its forward pass and its merge, and its files are trained so."""

    def __init__(self, site: AdapterSite, config: Any, r: int, scale: float) -> None:
        wrong = [n for n in ("use_dora", "lora_bias") if getattr(config, n)]
        wrong += ["init_lora_weights"] if config.init_lora_weights in ("eva", "corda", "lora_ga") else []
        if wrong:
            value = getattr(config, wrong[0])
            message = f"{wrong[0]} is {value!r}, which an nn.MultiheadAttention ({site.name}) does not support"
            raise ConfigError(message, str(isinstance(value, str)), f"or take {site.name} out of target_modules")
        if config.lora_dropout and not site.skip_init:
            what = "lora_dropout does nothing at an nn.MultiheadAttention, as in PEFT"
            warnings.warn(f"{site.name}: {what}", stacklevel=2)
        super().__init__(site, config, r, scale)

    def low_rank_factors(self) -> tuple[Tensor, Tensor, float]:
        return (*self.low_rank(), self.times * self.scale)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return add_low_rank_to_weight(weight, *self.low_rank_factors()), bias


def double_out_proj_scale_in_lora_attention(sites: Sequence[AdapterSite], modules: Iterable[AdapterModule]) -> None:
    """Set `times` to 2 at each out_proj whose attention module has the same adapter."""
    attentions = {site.name for site in sites if site.kind == "weight"}
    for site, module in zip(sites, modules, strict=True):
        if isinstance(module, AttentionWeightLora) and site.name.rpartition(".")[0] in attentions:
            module.times = 2
