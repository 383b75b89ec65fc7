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
from ..core.data.tokenized_dataset import list_tokens_and_labels_by_row
from ..core.kernels.linear_layers import get_base_layer_type
from ..core.models.dtype import pick_dtype
from ..core.training.datasets import tokenize_recipe_datasets
from ..core.training.objective import open_rows_for_objective
from ..errors import SlimtuneError
from ..extras.layer_inputs import add_damping, collect_layer_inputs, collect_second_moments, compute_second_moment
from .gguf_blocks import BlockFormat

ROWS = 32
"""Rows whose inputs decide in 16 bits; 64 did not bring the outputs nearer (benchmarks/merge_rounding.py)."""
MAX_TOKENS = 40_960
"""Of the rows whose inputs decide in fewer bits, where rounding changes the outputs more: a limit to an export's time.
The model that runs on them is not rounded: inputs behind layers that are rounded already, corrected for these, left no
more of the gain.
"""
MIN_TOKENS = 256
"""With fewer tokens weights are rounded to their nearest: a few texts say little about others."""
DAMPING, FEW_BIT_DAMPING = 0.01, 0.05
"""λ as a share of the mean of the diagonal of XᵀX. Errors of few bits are large: what fits the sample of inputs too
closely loses elsewhere (demo's run in Q4_0, 1,024 inputs: 0.003 leaves 86.0 % of the gain, 0.01 92.4 %, 0.05 93.8 %).
"""


def round_with_inputs(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a linear layer's weight `(out, in)` to `dtype` so that its outputs on `inputs` `(n, in)` change little."""
    weight, nearest = weight.float(), weight.to(dtype)
    factors = _factorize(_compute_second_moment(inputs), DAMPING)
    rounded, error = round_columns_in_turn(weight, factors, lambda column, _: column.to(dtype).float())
    is_better = error <= factors.measure_output_error(weight - nearest)
    return torch.where(is_better[:, None], rounded.to(dtype), nearest)


def round_to_blocks_with_inputs(weight: Tensor, second_moment: Tensor, block_format: BlockFormat) -> Tensor:
    """Round a weight `(out, in)` to a GGUF format so that its outputs on inputs change little.

    `second_moment` is (1/n) XᵀX of the inputs X, `(in, in)`. Scales are those that ggml finds for the weight, with
    errors weighted by the mean square of each input.

    Returns:
        the bytes, uint8 `(out, in / block_weights, block_bytes)`.
    """
    weight = weight.float()
    blocks = block_format.quantize_as_ggml(weight, second_moment.diagonal())
    scale, offset = (by_weight.flatten(1) for by_weight in block_format.expand_scales(blocks))
    quants, is_better = round_quants_with_inputs(
        weight, second_moment, scale, offset, block_format.find_nearest_quants, block_format.levels,
        block_format.dequantize(blocks).flatten(1),
    )  # fmt: skip
    rounded = blocks.clone()
    block_format.write_quants(rounded, quants.reshape(*blocks.shape[:2], -1))
    return torch.where(is_better[:, None, None], rounded, blocks)


def round_quants_with_inputs(
    weight: Tensor,
    second_moment: Tensor,
    scale: Tensor,
    offset: Tensor,
    find_nearest_quants: Callable[[Tensor, Tensor, Tensor], Tensor],
    levels: Tensor,
    nearest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose quants so that the outputs on inputs change little, where `value = scale · level[quant] + offset`.

    Args:
        weight: `(out, in)`, fp32; scale, offset: of each weight, alike.
        second_moment: (1/n) XᵀX of the inputs X, `(in, in)`.
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

    factors = _factorize(second_moment, FEW_BIT_DAMPING)
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


_compute_second_moment = functools.lru_cache(maxsize=1)(compute_second_moment)
"""Layers with the same input (q, k and v) follow one another."""


@functools.lru_cache(maxsize=1)
def _factorize(second_moment: Tensor, damping: float) -> InputFactors:
    H = add_damping(second_moment, damping)
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


def record_linear_layer_inputs(model: Any, recipe: Recipe | None, tokenizer: Any) -> dict[str, Tensor]:
    """Run an adapted model on the first rows of its run; return inputs `(n, in)` of its linear layers by name.

    Empty without a recipe, or if its rows are not there any more. The head is left out: it is often tied to embeddings.
    """
    rows: list[Any] = []
    with suppress(SlimtuneError):
        if recipe is not None:
            opened = open_rows_for_objective(recipe.data.train, recipe.data, recipe.objective())
            rows = list(itertools.islice(opened.require_valid_rows(), ROWS))
    tokenized = [r for r in tokenize_rows_with_errors(rows, tokenizer) if not isinstance(r, InvalidRow)]
    longest = recipe.data.max_seq_len if recipe is not None else None
    ids = [part.input_ids[:longest] for row in tokenized for part in row.split()]
    return _run_on_rows(collect_layer_inputs, model, ids)


def record_second_moments(model: Any, recipe: Recipe | None, tokenizer: Any) -> dict[str, Tensor]:
    """Run an adapted model on rows its run trained on; return the second moments `(in, in)` of its layers' inputs.

    They are those of all tokens of these rows. None of the rows is one that the run set aside, as these say how much of
    the gain is left. Empty if there are too few tokens, too.
    """
    ids: list[list[int]] = []
    with suppress(SlimtuneError):
        for example in tokenize_recipe_datasets(recipe, tokenizer).train if recipe is not None else ():
            if sum(map(len, ids)) >= MAX_TOKENS:
                break
            ids += [tokens for tokens, _ in list_tokens_and_labels_by_row(example)]
    return _run_on_rows(collect_second_moments, model, ids) if sum(map(len, ids)) >= MIN_TOKENS else {}


def _run_on_rows(collect: Callable[..., dict[str, Tensor]], model: Any, ids: list[list[int]]) -> dict[str, Tensor]:
    layers = {
        n: m for n, m in model.named_modules() if get_base_layer_type(m) == "linear" and "adapters" not in n.split(".")
    }
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    # How errors compensate needs no more precision than these inputs have.
    dtype, device = pick_dtype("auto", model.device), model.device.type
    faster = model.dtype == torch.float32 and dtype == torch.bfloat16
    with torch.autocast(device, dtype=dtype if faster else torch.bfloat16, enabled=faster):
        return collect(model, layers, ids) if ids else {}
