"""Merged weights in 16 bits whose products are those of the merged weights: GPTQ's rounding (arXiv 2210.17323).

    W' [out, in] → Q in 16 bits with the least ‖(Q - W') Xᵀ‖,  X [n, in]: what the map is given on the run's own rows

Each number rounded to its nearest leaves an error in every product, and errors add up, since a few directions carry
most of what a layer is given. So columns are rounded one after another, and what a column's rounding does to the
products is made up for in the columns still to come:

    H = (1/n) XᵀX + λ I,   H⁻¹ = UᵀU, U upper triangular:   W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] · U[j, j+1:]

λ keeps directions that no row showed as they are. The rows are those the run learned from, never those of the proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Recipe
from ..data.records import InvalidRow
from ..data.tokenize import tokenize_rows
from ..errors import SlimtuneError
from ..setup import open_rows_from_recipe
from ..utils.calibration import ROWS, collect_layer_inputs, second_moment
from ..utils.linear_layers import is_transposed, layer_kind

LEAST = 256
"""Inputs from which on they are heeded: a few texts say little of what a map is given on others."""
_DAMPING = 0.01
_BLOCK = 64


class Rounding:
    """How the maps of a model are rounded; one that got fewer than `LEAST` inputs is rounded number by number.

    Args:
        inputs: X by module's name.
        transposed: names of modules that hold their weight as `(in, out)`.
    """

    def __init__(self, inputs: Mapping[str, Tensor], transposed: Sequence[str] = ()) -> None:
        self.inputs, self._transposed = inputs, set(transposed)

    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a merged parameter as it is to be stored; as it is, if it holds what `dtype` cannot.

        Args:
            name: of the parameter, `model.layers.0.mlp.up_proj.weight`.
            weight: in fp32 at least.
            dtype: what it is stored in.
        """
        module, _, leaf = name.rpartition(".")
        inputs = self.inputs.get(module)
        nearest = weight.to(dtype)
        if not torch.isfinite(nearest).all():
            return weight  # for whoever stores it to refuse by name
        if leaf != "weight" or inputs is None or len(inputs) < LEAST or torch.equal(nearest, weight):
            return nearest
        turned = module in self._transposed
        found = compensated(weight.t() if turned else weight, inputs, dtype)
        return found.t() if turned else found


def compensated(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a map's weight `(out, in)` to `dtype`, so that its products with `inputs` `(n, in)` change little.

    A row of the weight whose products numbers rounded to their nearest would change less, is rounded so: columns are
    settled one by one, which is mostly better and not always.
    """
    gram = second_moment(inputs, _DAMPING)
    order = gram.diagonal().argsort(descending=True)  # what weighs most while most columns are left to make up for it
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order])), upper=True
    ).float()
    left, rounded = weight.float()[:, order], torch.empty_like(weight, dtype=dtype)
    for start in range(0, len(gram), _BLOCK):
        end = min(start + _BLOCK, len(gram))
        block, errors = left[:, start:end].clone(), []
        for j, u in enumerate(factor[start:end, start:end]):
            column = block[:, j].to(dtype)
            rounded[:, order[start + j]] = column
            errors.append((block[:, j] - column.float()) / u[j])
            block[:, j + 1 :] -= errors[-1][:, None] * u[j + 1 :]
        left[:, end:] -= torch.stack(errors, 1) @ factor[start:end, end:]
    nearest = weight.to(dtype)
    apart, plainly = (((q.float() - weight) @ inputs.float().t()).square().sum(1) for q in (rounded, nearest))
    return torch.where((apart <= plainly)[:, None], rounded, nearest)


def rounding_for(model: Any, recipe: Recipe | None, tokenizer: Any) -> Rounding:
    """Run rows that a run learned from, and return how its maps are rounded.

    Without a recipe, or where its rows are not there any more, numbers are rounded one by one.

    Args:
        model: the adapted model, not merged, in the dtype that inputs are wanted in.
        recipe: the run's.
        tokenizer: of its base.
    """
    try:
        rows = _rows(recipe, tokenizer) if recipe is not None else []
    except SlimtuneError:
        rows = []
    head = model.get_output_embeddings()  # often one tensor with the embeddings, which are rounded number by number
    maps = {n: m for n, m in model.named_modules() if layer_kind(m) == "linear" and m is not head and _is_of_base(n)}
    inputs = collect_layer_inputs(model, maps, rows) if rows else {}
    return Rounding(inputs, [n for n in inputs if is_transposed(maps[n])])


def _rows(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of the first training rows, as long as training took them."""
    some = list(itertools.islice(open_rows_from_recipe(recipe, recipe.data.train).rows(), ROWS))
    found = (one for one in tokenize_rows(some, tokenizer) if not isinstance(one, InvalidRow))
    return [one.input_ids[: recipe.data.max_seq_len] for _, one in found]


def _is_of_base(name: str) -> bool:
    return ".adapters." not in name and ".trained_copies." not in name
