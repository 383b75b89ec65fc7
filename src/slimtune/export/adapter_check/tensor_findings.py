"""What the tensors of a foreign adapter say by themselves: shapes, values, and how much each layer changes."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...core.foundation.progress_bars import track_progress
from ...core.kernels.linear_layers import is_finite
from .adapter_findings import AdapterFinding, LayerUpdateNorm, make_finding
from .foreign_adapter import ForeignAdapter
from .key_placement import LoraPairKeys, group_lora_pairs, list_adapter_names_in_keys

_LAYER = re.compile(r"(?P<layer>.*?\.\d+)(?:\.|$)")
_TOWERS = re.compile(r"vision|visual|image|audio|tower|speech")
"""Parts that a text does not reach: an adapter trained on texts leaves them as they are."""


class UpdateNorm(NamedTuple):
    """How much a LoRA changes one module, without its scale; None: not a plain product of two matrices."""

    norm: float | None
    is_zero: bool


def generalize_layer_indices(module: str) -> str:
    """Return a module's name with `*` for its indices: `layers.*.mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def find_shape_faults(adapter: ForeignAdapter) -> Iterator[AdapterFinding]:
    """Yield what is wrong with a file by its header alone."""
    tensors = adapter.tensors
    if not tensors:
        yield make_finding("no-tensors", f"{adapter.file.name} has {adapter.bytes} bytes and no tensor")
        return
    if empty := [key for key, t in tensors.items() if 0 in t.shape]:
        yield make_finding("empty-tensors", f"{len(empty)} of {len(tensors)} tensors have no values", empty)
    pairs = group_lora_pairs(tensors)
    matrices = {key for pair in pairs.values() for key in pair if key is not None}
    if flat := [
        key for key in tensors if key in matrices and len(tensors[key].shape) < 2 and 0 not in tensors[key].shape
    ]:
        shapes = ", ".join(str(list(tensors[key].shape)) for key in flat[:2])
        yield make_finding("flat-tensors", f"{len(flat)} of {len(tensors)} tensors are flat: {shapes}", flat)
    if integers := [key for key in tensors if key in matrices and not tensors[key].dtype.startswith(("F", "BF"))]:
        dtypes = sorted({tensors[key].dtype for key in integers})
        yield make_finding("whole-numbers", f"{len(integers)} matrices are stored as {', '.join(dtypes)}", integers)
    if halves := [key for pair in pairs.values() if None in pair for key in pair if key is not None]:
        yield make_finding("missing-half", f"{len(halves)} matrices are without their other half", halves)
    if len(names := list_adapter_names_in_keys(tensors)) > 1:
        yield make_finding("several-adapters", f"the keys contain {len(names)} adapters' names", names)


def find_value_faults(adapter: ForeignAdapter) -> tuple[list[AdapterFinding], dict[str, UpdateNorm]]:
    """Read every tensor once; return what is wrong with their values, and the update's norm by module."""
    damaged: list[str] = []
    pairs = group_lora_pairs(adapter.tensors)
    matrices = {key for pair in pairs.values() for key in pair if key is not None}

    def load(key: str) -> Tensor:
        tensor = adapter.load_tensor(key)
        if tensor.is_floating_point() and not is_finite(tensor):
            damaged.append(key)
        return tensor

    updates: dict[str, UpdateNorm] = {}
    for module, pair in track_progress(list(pairs.items()), "modules read"):
        loaded = [load(key).float() for key in pair if key is not None]
        if len(loaded) == 2:
            updates[module] = _measure_update(*loaded)
    for key in adapter.tensors.keys() - matrices:
        load(key)
    findings = []
    if damaged:
        damaged.sort(key=list(adapter.tensors).index)
        findings.append(
            make_finding("not-finite", f"{len(damaged)} of {len(adapter.tensors)} tensors contain NaN or Inf", damaged)
        )
    return [*findings, *_find_untrained(updates, pairs)], updates


def _measure_update(A: Tensor, B: Tensor) -> UpdateNorm:
    """Return the Frobenius norm of B A from the two r × r products; a matrix of zeros gives 0."""
    if not (A.any() and B.any()):
        return UpdateNorm(0.0, True)
    A, B = (t.flatten(1) if t.dim() > 2 else t for t in (A, B))
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        return UpdateNorm(None, False)
    squared = ((A @ A.T).double() * (B.T @ B).double()).sum().item()
    return UpdateNorm(math.sqrt(max(squared, 0.0)), False)


def _find_untrained(updates: Mapping[str, UpdateNorm], pairs: Mapping[str, LoraPairKeys]) -> Iterator[AdapterFinding]:
    zero = [module for module, update in updates.items() if update.is_zero]
    if not zero:
        return
    if len(zero) == len(updates):
        yield make_finding("untrained", f"B or A is 0 in each of {len(zero)} modules", zero)
        return
    faulty = list_modules_of_untrained_kinds(updates)
    if faulty:
        names = ", ".join(dict.fromkeys(generalize_layer_indices(m).rpartition("*.")[2] for m in faulty))
        yield make_finding("untrained-modules", f"B or A is 0 in all modules {names}", faulty)
    if some := [m for m in zero if m not in faulty]:
        yield make_finding("untrained-layers", f"B or A is 0 in {len(some)} of {len(updates)} modules", some)


def list_modules_of_untrained_kinds(updates: Mapping[str, UpdateNorm]) -> list[str]:
    """Return the modules of the kinds whose update is 0 in every layer, without those that a text does not reach."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in updates:
        kinds[generalize_layer_indices(module)].append(module)
    whole = (m for kind in kinds.values() if all(updates[m].is_zero for m in kind) for m in kind)
    return [module for module in whole if not _TOWERS.search(module)]


def sum_update_norms_by_layer(updates: Mapping[str, UpdateNorm], scales: Mapping[str, float]) -> list[LayerUpdateNorm]:
    """Return how much each layer changes; modules outside of the layers count by their own name."""
    squared: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for module, update in updates.items():
        if update.norm is None or not math.isfinite(update.norm):
            continue
        match: Any = _LAYER.match(module)
        layer = match["layer"] if match else module
        squared[layer] += (update.norm * scales.get(module, 1.0)) ** 2
        counts[layer] += 1
    return [LayerUpdateNorm(layer, math.sqrt(squared[layer]), counts[layer]) for layer in squared]
