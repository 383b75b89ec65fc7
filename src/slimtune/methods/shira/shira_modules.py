"""SHiRA's adapter modules."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite
from ...errors import AdapterError, ConfigError


class SparseWeightUpdate(AdapterModule):
    """`y + S x`."""

    no_op_values: ClassVar = {"shira_weight": 0.0}
    shira_indices: Tensor

    def __init__(self, site: AdapterSite, indices: Tensor, zero_init: bool) -> None:
        super().__init__()
        self.sizes = site.out_features, site.in_features
        values = (torch.zeros if zero_init else torch.randn)(indices.shape[1], device=site.init_device)
        self.shira_weight = nn.Parameter(values.to(site.device, site.dtype))
        self.register_buffer("shira_indices", indices.to(site.device))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # In y's dtype, which autocast chooses.
        return y + _SparseLinear.apply(x.to(y.dtype), self.shira_weight.to(y.dtype), self.shira_indices, self.sizes)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, columns = self.shira_indices.long()
        return weight.index_put((rows, columns), self.shira_weight.to(weight.dtype), accumulate=True), bias

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: AdapterSite) -> None:
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


def choose_trained_entries(config: Any, site: AdapterSite, n: int) -> Tensor:
    """Return the rows and columns of the entries as int32 `(2, n)`, in row-major order."""
    shape = (site.out_features, site.in_features)
    if config.mask_fn is not None:
        mask = config.mask_fn(site.module, config.r)
        ones = int((mask == 1).sum())
        if tuple(mask.shape) != shape or ones != n:
            raise ConfigError(
                f"mask_fn returned a mask {tuple(mask.shape)} with {ones:,} ones for {site.name}",
                f"{shape} with r · (in + out) = {n:,} ones",
            )
        return torch.stack(torch.where(mask == 1)).to(torch.int32)
    if config.mask_type != "random":
        message = f"mask_type is {config.mask_type!r}, and mask_fn is not set"
        hint = "config.mask_fn = f, where f(layer, r) returns the mask"
        raise ConfigError(message, "'random', or a mask_fn", hint)
    generator = torch.Generator()
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    flat = torch.randperm(shape[0] * shape[1], generator=generator)[:n].sort().values
    return torch.stack([flat // shape[1], flat % shape[1]]).to(torch.int32)
