"""Round merged weights to 16 bits so that the layer's outputs change little: GPTQ's method (arXiv 2210.17323).

    W' [out, in] → Q in 16 bits with small ‖(Q - W') Xᵀ‖,  X [n, in]: the layer's inputs on rows the run trained on

Errors of rounding to the nearest add up, because a few directions carry most of a layer's input. So columns are rounded
one after another, and the columns that follow compensate the error that one leaves in the outputs:

    H = (1/n) XᵀX + λ I = M Mᵀ,   U = M⁻¹, both upper triangular
    E[:, j] = (W[:, j] - Q[:, j]) / U[j, j],   W[:, j+1:] -= E[:, j] U[j, j+1:]

In the end W' - Q = E U, so the mean error of the outputs, (W' - Q) H (W' - Q)ᵀ, is E Eᵀ: it costs nothing to know.
"""

import functools
import itertools
from contextlib import suppress
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
from ..extras.layer_inputs import collect_layer_inputs, compute_second_moment

ROWS = 32
"""Rows whose inputs decide; 64 did not bring the outputs nearer (benchmarks/merge_rounding.py)."""


def round_with_inputs(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a linear layer's weight `(out, in)` to `dtype` so that its outputs on `inputs` `(n, in)` change little."""
    weight, nearest = weight.float(), weight.to(dtype)
    order, M, U = _factorize(inputs)
    left = weight.t()[order]  # (in, out): each of the weight's columns is contiguous
    rounded, error = torch.empty_like(left, dtype=dtype), torch.zeros(len(weight))
    for start in range(0, len(order), 64):  # in blocks, so that most of the work is a matrix product
        end = min(start + 64, len(order))
        block, errors = left[start:end], torch.empty_like(left[start:end])
        for j, row in enumerate(U[start:end, start:end]):
            rounded[start + j] = block[j]
            torch.sub(block[j], rounded[start + j], out=errors[j]).div_(row[j])
            block[j + 1 :].addr_(row[j + 1 :], errors[j], alpha=-1)
        left[end:].addmm_(U[start:end, end:].t(), errors, alpha=-1)
        error += errors.square().sum(0)
    nearest_error = ((weight - nearest)[:, order] @ M).square().sum(1)
    return torch.where((error <= nearest_error)[:, None], rounded[order.argsort()].t(), nearest)


@functools.lru_cache(maxsize=1)  # layers with the same input (q, k and v) follow one another
def _factorize(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order of the columns, the most important first, and M and U of the inputs in that order."""
    H = compute_second_moment(inputs, damping=0.01)
    order = H.diagonal().argsort(descending=True)  # while most columns can still compensate
    M = torch.linalg.cholesky(H[order][:, order].flip(0, 1)).flip(0, 1).float()
    return order, M, _invert_upper(M)


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
    """Run an adapted model on the first rows its run trained on; return the inputs of its linear layers by name.

    Empty without a recipe, or if its rows are not there any more. The head is left out: it is often tied to embeddings.
    """
    rows: list[Any] = []
    with suppress(SlimtuneError):
        if recipe is not None:
            opened = open_rows_for_objective(recipe.data.train, recipe.data, recipe.objective())
            rows = list(itertools.islice(opened.require_valid_rows(), ROWS))
    tokenized = [r for r in tokenize_rows_with_errors(rows, tokenizer) if not isinstance(r, InvalidRow)]
    ids = [part.input_ids for row in tokenized for part in row.split()]
    layers = {
        n: m for n, m in model.named_modules() if get_base_layer_type(m) == "linear" and "adapters" not in n.split(".")
    }
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    longest = recipe.data.max_seq_len if recipe is not None else None
    # How errors compensate needs no more precision than these inputs have.
    dtype, device = pick_dtype("auto", model.device), model.device.type
    faster = model.dtype == torch.float32 and dtype == torch.bfloat16
    with torch.autocast(device, dtype=dtype if faster else torch.bfloat16, enabled=faster):
        return collect_layer_inputs(model, layers, [row[:longest] for row in ids]) if ids else {}
