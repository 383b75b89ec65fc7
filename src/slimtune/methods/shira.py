"""SHiRA: y = (W + S) x + b, with W and b frozen and S sparse: a few single entries of the weight train.

S has n = r · (in + out) entries, as many as a LoRA of rank r has parameters, at random positions; they start at zero,
so the model starts unchanged. Parameters added per layer: n. Merged: W + S, a change of any rank.

Paper: https://arxiv.org/abs/2406.13175. File format: PEFT's `shira_weight (n)` and `shira_indices (2, n)`, the rows and
columns of the entries in row-major order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapters.adapter_module import AdapterModule, Site
from ..core.adapters.architectures import DEFAULT_TARGETS
from ..core.adapters.peft_config import FAN_IN_FAN_OUT_HELP, TargetedConfig, setting
from ..errors import AdapterError, ConfigError


@dataclass
class ShiraConfig(TargetedConfig):
    """SHiRA: trained entries of a weight; PEFT's field names and defaults."""

    name: ClassVar = "shira"
    prefix: ClassVar = "shira_"
    learning_rate: ClassVar = 1e-3
    architecture_targets: ClassVar = {**DEFAULT_TARGETS, "phi": ["q_proj", "v_proj"]}
    extension_fields: ClassVar = frozenset(["exclude_modules", "layers_to_transform", "layers_pattern"])
    short_names: ClassVar = {"rank": "r", "seed": "random_seed", "targets": "target_modules"}
    recipe_defaults: ClassVar = {"r": 16, "target_modules": "all-linear"}
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None
    """`f(layer, r)` returns a mask `(out, in)` of the trained entries; set on a config, as in PEFT, and not saved."""

    r: int = setting(32, "sets the number of entries, r · (in + out); does not limit the rank of the change", ge=1)
    mask_type: str = setting("random", "how entries are chosen; any other name: by config.mask_fn")
    random_seed: int | None = setting(
        None, "seed of the random positions; None: torch's default, the same each time", le=2**63 - 1
    )
    fan_in_fan_out: bool = setting(False, FAN_IN_FAN_OUT_HELP)
    init_weights: bool = setting(True, "start at zero; False: normal random entries, for tests")

    def build(self, site: Site) -> AdapterModule:
        inputs, outputs = site.in_features, site.out_features
        n, size = self.r * (inputs + outputs), inputs * outputs
        if n > size:
            message = f"r={self.r} is {n:,} entries for {site.name}, which has {size:,}"
            raise ConfigError(message, f"r up to {size // (inputs + outputs)} there")
        indices = torch.zeros(2, n, dtype=torch.int32, device=site.init_device)
        return SparseUpdate(site, indices if site.loading else self._choose_entries(site, n), self.init_weights)

    def _choose_entries(self, site: Site, n: int) -> Tensor:
        """Return the rows and columns of the entries as int32 `(2, n)`, in row-major order."""
        shape = (site.out_features, site.in_features)
        if self.mask_fn is not None:
            mask = self.mask_fn(site.module, self.r)
            ones = int((mask == 1).sum())
            if tuple(mask.shape) != shape or ones != n:
                raise ConfigError(
                    f"mask_fn returned a mask {tuple(mask.shape)} with {ones:,} ones for {site.name}",
                    f"{shape} with r · (in + out) = {n:,} ones",
                )
            return torch.stack(torch.where(mask == 1)).to(torch.int32)
        if self.mask_type != "random":
            message = f"mask_type is {self.mask_type!r}, and mask_fn is not set"
            hint = "config.mask_fn = f, where f(layer, r) returns the mask"
            raise ConfigError(message, "'random', or a mask_fn", hint)
        generator = torch.Generator()
        if self.random_seed is not None:
            generator.manual_seed(self.random_seed)
        flat = torch.randperm(shape[0] * shape[1], generator=generator)[:n].sort().values
        return torch.stack([flat // shape[1], flat % shape[1]]).to(torch.int32)


class SparseUpdate(AdapterModule):
    """`y + S x`."""

    neutral: ClassVar = {"shira_weight": 0.0}
    shira_indices: Tensor

    def __init__(self, site: Site, indices: Tensor, zero: bool) -> None:
        super().__init__()
        self.sizes = site.out_features, site.in_features
        values = (torch.zeros if zero else torch.randn)(indices.shape[1], device=site.init_device)
        self.shira_weight = nn.Parameter(values.to(site.device, site.dtype))
        self.register_buffer("shira_indices", indices.to(site.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # In y's dtype, which autocast chooses.
        return y + _SparseLinear.apply(x.to(y.dtype), self.shira_weight.to(y.dtype), self.shira_indices, self.sizes)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, columns = self.shira_indices.long()
        return weight.index_put((rows, columns), self.shira_weight.to(weight.dtype), accumulate=True), bias

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: Site) -> None:
        """Check that a file's indices are inside the weight and in row-major order, which the products rely on."""
        indices = state_dict.get("shira_indices")
        if indices is None or indices.shape != self.shira_indices.shape:
            return
        rows, columns = indices.long()
        inside = ((rows >= 0) & (rows < self.sizes[0]) & (columns >= 0) & (columns < self.sizes[1])).all()
        if not inside or not ((rows * self.sizes[1] + columns).diff() > 0).all():
            raise AdapterError(
                f"{site.name}: shira_indices are not distinct entries of a matrix {self.sizes} in row-major order",
                "the indices as they were saved",
                "save the adapter again where it was trained",
            )


class _SparseLinear(torch.autograd.Function):
    """`S x`. It saves x, which the layer has anyway; autograd would save the dense S or the sparse product's copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, sizes: tuple[int, int]) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(x, values, indices)
        return _sparse_times(values, indices, sizes, x, is_sorted=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, values, indices = ctx.saved_tensors
        grad_x = _sparse_times(values, indices.flip(0), ctx.sizes[::-1], grad) if ctx.needs_input_grad[0] else None
        # One dense product, freed at once: entry by entry would need n times the number of tokens.
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        rows, columns = indices.long()
        return grad_x, dense[rows, columns], None, None


def _sparse_times(
    values: Tensor, indices: Tensor, sizes: tuple[int, int], x: Tensor, is_sorted: bool = False
) -> Tensor:
    """Return `S x` for `x (..., columns)` and S `(rows, columns)` with `values (n)` at `indices (2, n)`."""
    if x.numel() > 16 * x.shape[-1]:
        # From about 16 positions on a sparse product is slower than a dense one with a temporary dense S.
        rows, columns = indices.long()
        return torch.nn.functional.linear(x, values.new_zeros(sizes).index_put((rows, columns), values))
    S = torch.sparse_coo_tensor(indices, values, sizes, check_invariants=False, is_coalesced=is_sorted or None)
    return torch.sparse.mm(S, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], sizes[0])
