"""Round merged weights to few bits so that the layer's outputs change little: GPTQ's method (arXiv 2210.17323).

    W' [out, in] → Q with small ‖(Q - W') Xᵀ‖,  X [n, in]: the layer's inputs on rows the run trained on

Q holds numbers of 16 bits, or those that the blocks of a GGUF format can hold (`gguf_blocks.py`).

Errors of rounding to the nearest add up, because a few directions carry most of a layer's input. So columns are rounded
one after another, and the columns that follow compensate the error that one leaves in the outputs:

    H = (1/n) XᵀX + λ I = M Mᵀ,   U = M⁻¹, both upper triangular
    E[:, j] = (W[:, j] - Q[:, j]) / U[j, j],   W[:, j+1:] -= E[:, j] U[j, j+1:]

In the end W' - Q = E U, so the mean error of the outputs, (W' - Q) H (W' - Q)ᵀ, is E Eᵀ: it costs nothing to know.
"""

import functools
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import Recipe
from ..core.data.rows import InvalidRow
from ..core.data.tokenize import tokenize_rows_with_errors
from ..core.kernels.linear_layers import get_base_layer_type
from ..core.models.dtype import pick_dtype
from ..core.training.objective import open_rows_for_objective
from ..errors import SlimtuneError
from ..extras.layer_inputs import MAX_INPUTS, collect_layer_inputs, compute_second_moment
from .gguf_blocks import BlockFormat

ROWS = 32
"""Rows whose inputs decide in 16 bits; 64 did not bring the outputs nearer (benchmarks/merge_rounding.py)."""
FEW_BIT_ROWS, FEW_BIT_INPUTS = 128, 4096
"""Rows, and inputs kept for a layer, that decide in fewer bits, where rounding changes the outputs more. The model that
gives them is not rounded: inputs behind layers that are rounded already, corrected for these, left no more of the gain.
"""
DAMPING, FEW_BIT_DAMPING = 0.01, 0.05
"""λ as a share of the mean of the diagonal of XᵀX. Errors of few bits are large: what fits the sample of inputs too
closely loses elsewhere (demo's run in Q4_0, 1,024 inputs: 0.003 leaves 86.0 % of the gain, 0.01 92.4 %, 0.05 93.8 %).
"""


def round_with_inputs(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a linear layer's weight `(out, in)` to `dtype` so that its outputs on `inputs` `(n, in)` change little."""
    weight, nearest = weight.float(), weight.to(dtype)
    factors = _factorize(inputs, DAMPING)
    rounded, error = round_columns_in_turn(weight, factors, lambda column, _: column.to(dtype).float())
    is_better = error <= factors.measure_output_error(weight - nearest)
    return torch.where(is_better[:, None], rounded.to(dtype), nearest)


def round_to_blocks_with_inputs(weight: Tensor, inputs: Tensor, block_format: BlockFormat) -> Tensor:
    """Round a weight `(out, in)` to a GGUF format so that its outputs on `inputs` `(n, in)` change little.

    Scales are those that ggml finds for the weight, with errors weighted by the mean square of each input.

    Returns:
        the bytes, uint8 `(out, in / block_weights, block_bytes)`.
    """
    weight = weight.float()
    blocks = block_format.quantize_as_ggml(weight, inputs.float().square().mean(0))
    scale, offset = (by_weight.flatten(1) for by_weight in block_format.expand_scales(blocks))
    quants, is_better = round_quants_with_inputs(
        weight, inputs, scale, offset, block_format.find_nearest_quants, block_format.levels,
        block_format.dequantize(blocks).flatten(1),
    )  # fmt: skip
    rounded = blocks.clone()
    block_format.write_quants(rounded, quants.reshape(*blocks.shape[:2], -1))
    return torch.where(is_better[:, None, None], rounded, blocks)


def round_quants_with_inputs(
    weight: Tensor,
    inputs: Tensor,
    scale: Tensor,
    offset: Tensor,
    find_nearest_quants: Callable[[Tensor, Tensor, Tensor], Tensor],
    levels: Tensor,
    nearest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose quants so that the outputs on inputs change little, where `value = scale · level[quant] + offset`.

    Args:
        weight: `(out, in)`, fp32; scale, offset: of each weight, alike.
        inputs: `(n, in)`.
        find_nearest_quants: gets values, scales and offsets of the same shape; returns the nearest quants, int64.
        levels: by quant.
        nearest: the weight, rounded to its nearest values `(out, in)`.

    Returns:
        quants, uint8 `(out, in)`, and for each row whether its outputs change less than by the nearest values.
    """
    scale, offset = scale.t().contiguous(), offset.t().contiguous()
    quants = torch.empty(weight.shape[::-1], dtype=torch.uint8)

    def round_column(column: Tensor, j: int) -> Tensor:
        found = find_nearest_quants(column, scale[j], offset[j])
        quants[j] = found
        return scale[j] * levels[found] + offset[j]

    factors = _factorize(inputs, FEW_BIT_DAMPING)
    _, error = round_columns_in_turn(weight, factors, round_column)
    return quants.t(), error <= factors.measure_output_error(weight - nearest)


@dataclass(frozen=True)
class InputFactors:
    """M and U of a layer's inputs, in the order in which columns are rounded."""

    order: Tensor
    """The columns, the most important first, while most columns can still compensate."""
    M: Tensor
    U: Tensor

    def measure_output_error(self, weight_error: Tensor) -> Tensor:
        """Return the mean squared error of each output by an error of the weight `(out, in)`."""
        return (weight_error[:, self.order] @ self.M).square().sum(1)


def round_columns_in_turn(
    weight: Tensor, factors: InputFactors, round_column: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Round a weight's columns one after another, each after the ones before it left their errors to it.

    Args:
        weight: `(out, in)`, fp32.
        factors: of the layer's inputs.
        round_column: gets values `(out,)` and the column they are in; returns what they are rounded to.

    Returns:
        the rounded weight `(out, in)`, and the mean squared error of each output `(out,)`.
    """
    order, U = factors.order, factors.U
    left = weight.t()[order]  # (in, out): each of the weight's columns is contiguous
    rounded, error = torch.empty_like(left), torch.zeros(len(weight))
    columns = order.tolist()
    for start in range(0, len(order), 64):  # in blocks, so that most of the work is a matrix product
        end = min(start + 64, len(order))
        block, errors = left[start:end], torch.empty_like(left[start:end])
        for j, row in enumerate(U[start:end, start:end]):
            rounded[start + j] = round_column(block[j], columns[start + j])
            torch.sub(block[j], rounded[start + j], out=errors[j]).div_(row[j])
            block[j + 1 :].addr_(row[j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
        error += errors.square().sum(0)
    return rounded[order.argsort()].t(), error


@functools.lru_cache(maxsize=1)  # layers with the same input (q, k and v) follow one another
def _factorize(inputs: Tensor, damping: float) -> InputFactors:
    H = compute_second_moment(inputs, damping)
    order = H.diagonal().argsort(descending=True)
    M = torch.linalg.cholesky(H[order][:, order].flip(0, 1)).flip(0, 1).float()
    return InputFactors(order, M, _invert_upper(M))


def _invert_upper(M: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix: by halves, in half the time of a solver."""
    half = len(M) // 2
    if half < 32:
        return torch.linalg.solve_triangular(M, torch.eye(len(M)), upper=True)
    U = torch.zeros_like(M)
    U[:half, :half], U[half:, half:] = _invert_upper(M[:half, :half]), _invert_upper(M[half:, half:])
    U[:half, half:] = -(U[:half, :half] @ M[:half, half:]) @ U[half:, half:]
    return U


def record_linear_layer_inputs(
    model: Any, recipe: Recipe | None, tokenizer: Any, max_rows: int = ROWS, max_inputs: int = MAX_INPUTS
) -> dict[str, Tensor]:
    """Run an adapted model on the first rows its run trained on; return the inputs of its linear layers by name.

    Empty without a recipe, or if its rows are not there any more. The head is left out: it is often tied to embeddings.
    """
    rows: list[Any] = []
    with suppress(SlimtuneError):
        if recipe is not None:
            opened = open_rows_for_objective(recipe.data.train, recipe.data, recipe.objective())
            rows = list(itertools.islice(opened.require_valid_rows(), max_rows))
    tokenized = [r for r in tokenize_rows_with_errors(rows, tokenizer) if not isinstance(r, InvalidRow)]
    ids = [part.input_ids for row in tokenized for part in row.split()]
    layers = {
        n: m for n, m in model.named_modules() if get_base_layer_type(m) == "linear" and "adapters" not in n.split(".")
    }
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    longest = recipe.data.max_seq_len if recipe is not None else None
    # How errors compensate needs no more precision than these inputs have.
    dtype, device = pick_dtype("auto", model.device), model.device.type
    kept = torch.bfloat16 if max_inputs > MAX_INPUTS else None  # 4,096 of every layer would take gigabytes
    faster = model.dtype == torch.float32 and dtype == torch.bfloat16
    with torch.autocast(device, dtype=dtype if faster else torch.bfloat16, enabled=faster):
        return collect_layer_inputs(model, layers, [row[:longest] for row in ids], max_inputs, kept) if ids else {}
