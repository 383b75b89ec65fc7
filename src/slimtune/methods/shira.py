"""SHiRA: y = (W + S) x + b, with W and b frozen and S sparse: a few single entries of the weight train.

S has n = r · (in + out) entries, as many as a LoRA of rank r has, at places drawn at random; they start at zero, so the
model starts unchanged. Parameters added per layer: n. Merged: W + S, of any rank.

Paper: https://arxiv.org/abs/2406.13175. File format: PEFT's `shira_weight (n)` and `shira_indices (2, n)`, the rows and
columns of the entries, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.architectures import DEFAULT_TARGETS
from ..adapters.base import AdapterModule, Site
from ..adapters.config import TargetedConfig
from ..errors import AdapterError, ConfigError


@dataclass
class ShiraConfig(TargetedConfig):
    """SHiRA: chosen entries of a weight; PEFT's field names and defaults.

    Args:
        r: sets the number of entries, r · (in + out), 1 and up; no limit to the rank of the change.
        mask_type: "random", or any other name where `mask_fn` is set: `config.mask_fn = f`, with `f(layer, r)` giving a
            mask (out, in) of zeros and ones, r · (in + out) of them ones.
        random_seed: seed of the random places, a whole number; None: the generator's own, the same each time.
        fan_in_fan_out: the base stores its weights as (in, out); known by itself for GPT-2's Conv1D.
        init_weights: start at zero; False: at normal random numbers, for tests.
    """

    name: ClassVar[str] = "shira"
    learning_rate: ClassVar[float] = 1e-3
    extension_fields: ClassVar[frozenset[str]] = frozenset(["exclude_modules", "layers_to_transform", "layers_pattern"])
    short_names: ClassVar[dict[str, str]] = {"rank": "r", "seed": "random_seed", "targets": "target_modules"}
    recipe_defaults: ClassVar[dict[str, Any]] = {"r": 16, "target_modules": "all-linear"}
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None
    """Chooses the entries instead of chance; set on a config, as in PEFT, and not written to its file."""

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def check(self) -> None:
        """Check that r and the seed are whole numbers."""
        super().check()
        self.require_whole("r")
        self.require_whole("random_seed", None, none=True)

    @classmethod
    def targets_by_architecture(cls) -> Mapping[str | None, list[str]]:
        """Return LoRA's targets, and fewer for Phi."""
        return {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}

    def build(self, site: Site) -> AdapterModule:
        """Return the sparse change at `site`."""
        most = site.in_features * site.out_features // (site.in_features + site.out_features)
        if self.r > most:
            raise ConfigError(
                f"r={self.r} is {self.r * (site.in_features + site.out_features):,} entries for {site.name}, which has "
                f"{site.in_features * site.out_features:,}",
                f"r up to {most} there",
            )
        return Sparse(site, self._places(site), self.init_weights)

    def _places(self, site: Site) -> Tensor:
        """Return rows and columns of the entries as int32 `(2, n)`, row by row."""
        n = self.r * (site.in_features + site.out_features)
        if site.loading or site.device.type == "meta":
            return torch.zeros(2, n, dtype=torch.int32, device=site.init_device)
        if self.mask_fn is not None:
            mask = self.mask_fn(site.module, self.r)
            shape, ones = tuple(mask.shape), int((mask == 1).sum())
            if shape != (site.out_features, site.in_features) or ones != n:
                raise ConfigError(
                    f"mask_fn gave a mask {shape} with {ones:,} ones for {site.name}",
                    f"({site.out_features}, {site.in_features}) with r · (in + out) = {n:,} ones",
                )
            return torch.stack(torch.where(mask == 1)).to(torch.int32)
        if self.mask_type != "random":
            raise ConfigError(
                f"mask_type is {self.mask_type!r}, and no mask_fn is set",
                "'random', or a mask_fn of your own",
                "config.mask_fn = f, with f(layer, r) giving the mask",
            )
        generator = torch.Generator()
        if self.random_seed is not None:
            generator.manual_seed(self.random_seed)
        flat = torch.randperm(site.in_features * site.out_features, generator=generator)[:n].sort().values
        return torch.stack([flat // site.in_features, flat % site.in_features]).to(torch.int32)


_FEW = 16
"""Positions up to which a sparse product is taken: while generating there is one a row."""


class Sparse(AdapterModule):
    """`y + S x`."""

    def __init__(self, site: Site, places: Tensor, init: bool) -> None:
        super().__init__()
        self.sizes = site.out_features, site.in_features
        start = (torch.zeros if init else torch.randn)(places.shape[1], device=site.init_device)
        self.shira_weight = nn.Parameter(start.to(site.device, site.dtype))
        self.shira_indices: Tensor
        self.register_buffer("shira_indices", places.to(site.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Map `x (..., in)`, `y (..., out)` to `(..., out)`; computes in y's dtype, which autocast chooses."""
        return y + _SparseLinear.apply(x.to(y.dtype), self.shira_weight.to(y.dtype), self.shira_indices, self.sizes)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `W + S` and the bias as it is."""
        rows, columns = self.shira_indices.long()
        return weight.index_put((rows, columns), self.shira_weight.to(weight.dtype), accumulate=True), bias

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Check that the places a file names are there, and row by row: what multiplies by S relies on it."""
        places = given.get("shira_indices")
        if places is None or places.shape != self.shira_indices.shape:
            return
        rows, columns = places.long()
        flat = rows * self.sizes[1] + columns
        inside = ((rows >= 0) & (rows < self.sizes[0]) & (columns >= 0) & (columns < self.sizes[1])).all()
        if not inside or not (flat.diff() > 0).all():
            raise AdapterError(
                f"{site.name}: shira_indices are no places of a matrix {self.sizes}, each once, row by row",
                "what was saved",
                "save the adapter anew where it was trained",
            )


class _SparseLinear(torch.autograd.Function):
    """`S x`; keeps x, which the layer has anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor, sizes: tuple[int, int]) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(x, values, places)
        return _times(values, places, sizes, x, in_order=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, values, places = ctx.saved_tensors
        of_x = _times(values, places.flip(0), ctx.sizes[::-1], grad) if ctx.needs_input_grad[0] else None
        # One dense product, dropped at once: entry by entry it would take n times the number of tokens.
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        rows, columns = places.long()
        return of_x, dense[rows, columns], None, None


def _times(values: Tensor, places: Tensor, sizes: tuple[int, int], x: Tensor, in_order: bool = False) -> Tensor:
    """Return `S x` for `x (..., columns)` and S `(rows, columns)` with `values (n)` at `places (2, n)`."""
    if x.numel() > _FEW * x.shape[-1]:
        # A dense S, dropped at once: sparse products are slower from a few positions on.
        rows, columns = places.long()
        return torch.nn.functional.linear(x, values.new_zeros(sizes).index_put((rows, columns), values))
    # In order, row by row, they need not be sorted first.
    S = torch.sparse_coo_tensor(places, values, sizes, check_invariants=False, is_coalesced=in_order or None)
    return torch.sparse.mm(S, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], sizes[0])
