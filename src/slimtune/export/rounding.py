"""Round merged weights to 16 bits so that the layer's outputs change little: GPTQ's method (arXiv 2210.17323).

    W' [out, in] → Q in 16 bits with small ‖(Q - W') Xᵀ‖,  X [n, in]: the layer's inputs on rows the run trained on

Errors of rounding to the nearest add up, because a few directions carry most of a layer's input. So columns are rounded
one after another, and the columns that follow compensate the error that one leaves in the outputs:

    H = (1/n) XᵀX + λ I,   H⁻¹ = UᵀU, U upper triangular:   W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] · U[j, j+1:]
"""

import itertools
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..config import Recipe
from ..data.formats import InvalidRow
from ..data.tokenize import tokenize_rows
from ..errors import SlimtuneError
from ..setup import open_rows_from_recipe
from ..utils.calibration import ROWS, collect_layer_inputs, second_moment
from ..utils.linear_layers import layer_kind


def round_with_inputs(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a linear layer's weight `(out, in)` to `dtype` so that its outputs on `inputs` `(n, in)` change little."""
    weight, nearest = weight.float(), weight.to(dtype)
    hessian = second_moment(inputs, damping=0.01)
    order = hessian.diagonal().argsort(descending=True)  # the most important while most columns can still compensate
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, rounded = weight[:, order], torch.empty_like(nearest)
    for start in range(0, len(hessian), 64):  # in blocks, so that most of the work is a matrix product
        end = min(start + 64, len(hessian))
        block, errors = left[:, start:end].clone(), []
        for j, row in enumerate(factor[start:end, start:end]):
            column = rounded[:, order[start + j]] = block[:, j].to(dtype)
            errors.append((block[:, j] - column.float()) / row[j])
            block[:, j + 1 :] -= errors[-1][:, None] * row[j + 1 :]
        left[:, end:] -= torch.stack(errors, 1) @ factor[start:end, end:]
    error, nearest_error = (((q.float() - weight) @ inputs.float().t()).square().sum(1) for q in (rounded, nearest))
    return torch.where((error <= nearest_error)[:, None], rounded, nearest)


def collect_rounding_inputs(model: Any, recipe: Recipe | None, tokenizer: Any) -> dict[str, Tensor]:
    """Run an adapted model on the first rows its run trained on; return the inputs of its linear layers by name.

    Empty without a recipe, or if its rows are not there any more. The head is left out: it is often tied to embeddings.
    """
    rows: list[Any] = []
    with suppress(SlimtuneError):
        if recipe is not None:
            rows = list(itertools.islice(open_rows_from_recipe(recipe, recipe.data.train).require_valid_rows(), ROWS))
    tokenized = [r for r in tokenize_rows(rows, tokenizer) if not isinstance(r, InvalidRow)]
    ids = [part.input_ids for row in tokenized for part in row.split()]
    layers = {n: m for n, m in model.named_modules() if layer_kind(m) == "linear" and "adapters" not in n.split(".")}
    layers = {n: m for n, m in layers.items() if m is not model.get_output_embeddings()}
    longest = recipe.data.max_seq_len if recipe is not None else None
    return collect_layer_inputs(model, layers, [row[:longest] for row in ids]) if ids else {}
