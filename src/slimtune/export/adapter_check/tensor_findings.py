"""What the tensors of a foreign adapter say by themselves: shapes, values, and how much each layer changes."""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from ...core.foundation.progress_bars import track_progress
from ...core.kernels.linear_layers import is_finite
from .adapter_findings import AdapterFinding, LayerUpdateNorm, make_finding
from .foreign_adapter import ForeignAdapter
from .key_placement import LoraPairKeys, group_lora_pairs, list_adapter_names_in_keys

_LAYER = re.compile(r"(?P<layer>.*?\.\d+)(?:\.|$)")
UpdateNorms = Mapping[str, float | None]
"""How much a LoRA changes each module, without its scale; None: not a plain product of two matrices."""
_TOWERS = re.compile(r"vision|visual|image|audio|tower|speech")
"""Parts that a text does not reach: an adapter trained on texts leaves them as they are."""


def generalize_layer_indices(module: str) -> str:
    """Return a module's name with `*` for its indices: `layers.*.mlp.experts.*.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def find_tensor_faults(adapter: ForeignAdapter) -> tuple[list[AdapterFinding], UpdateNorms]:
    """Read every tensor once; return what is wrong with shapes, dtypes and values, and the update's norm by module."""
    tensors, of_all = adapter.tensors, f"of {len(adapter.tensors)} tensors"
    if not tensors:
        return [make_finding("no-tensors", f"{adapter.file.name} has {adapter.bytes} bytes and no tensor")], {}
    pairs, names = group_lora_pairs(tensors), list_adapter_names_in_keys(tensors)
    matrices = {key: tensors[key] for pair in pairs.values() for key in pair if key is not None}
    flat = {key: list(t.shape) for key, t in matrices.items() if len(t.shape) < 2 and 0 not in t.shape}
    integers = {key: t.dtype for key, t in matrices.items() if not t.dtype.startswith(("F", "BF"))}
    halves = [key for pair in pairs.values() if None in pair for key in pair if key is not None]
    damaged, updates = _read_values(adapter, pairs)
    found = [
        make_finding(code, f"{len(keys)} {what}", keys)
        for code, keys, what in (
            ("empty-tensors", [key for key, t in tensors.items() if 0 in t.shape], f"{of_all} have no values"),
            ("flat-tensors", [*flat], f"{of_all} are flat: {', '.join(map(str, [*flat.values()][:2]))}"),
            ("whole-numbers", [*integers], f"matrices are stored as {', '.join(sorted({*integers.values()}))}"),
            ("missing-half", halves, "matrices are without their other half"),
            ("several-adapters", names if len(names) > 1 else [], "adapters' names are in the keys"),
            ("not-finite", damaged, f"{of_all} contain NaN or Inf"),
        )
        if keys
    ]
    return [*found, *_find_untrained(updates)], updates


def _read_values(adapter: ForeignAdapter, pairs: Mapping[str, LoraPairKeys]) -> tuple[list[str], UpdateNorms]:
    """Return the keys of tensors with NaN or Inf, and the norm of each module's update."""
    damaged, updates = set[str](), dict[str, float | None]()

    def load(key: str) -> Tensor:
        tensor = adapter.load_tensor(key)
        if tensor.is_floating_point() and not is_finite(tensor):
            damaged.add(key)
        return tensor

    for module, pair in track_progress(list(pairs.items()), "modules read"):
        loaded = [load(key).float() for key in pair if key is not None]
        if len(loaded) == 2:
            updates[module] = _measure_update(*loaded)
    for key in adapter.tensors.keys() - {key for pair in pairs.values() for key in pair}:
        load(key)
    return [key for key in adapter.tensors if key in damaged], updates


def _measure_update(A: Tensor, B: Tensor) -> float | None:
    """Return the Frobenius norm of B A from the two r × r products; only a matrix of zeros gives 0."""
    if not (A.any() and B.any()):
        return 0.0
    A, B = (t.flatten(1) if t.dim() > 2 else t for t in (A, B))
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        return None
    squared = ((A @ A.T).double() * (B.T @ B).double()).sum().item()
    return math.sqrt(max(squared, sys.float_info.min))


def _find_untrained(updates: UpdateNorms) -> Iterator[AdapterFinding]:
    zero = [module for module, norm in updates.items() if norm == 0]
    if zero and len(zero) == len(updates):
        yield make_finding("untrained", f"B or A is 0 in each of {len(zero)} modules", zero)
        return
    if faulty := list_modules_of_untrained_kinds(updates):
        names = ", ".join(dict.fromkeys(generalize_layer_indices(m).rpartition("*.")[2] for m in faulty))
        yield make_finding("untrained-modules", f"B or A is 0 in all modules {names}", faulty)
    if some := [m for m in zero if m not in faulty]:
        yield make_finding("untrained-layers", f"B or A is 0 in {len(some)} of {len(updates)} modules", some)


def list_modules_of_untrained_kinds(updates: UpdateNorms) -> list[str]:
    """Return the modules of the kinds whose update is 0 in every layer, without those that a text does not reach."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for module in updates:
        kinds[generalize_layer_indices(module)].append(module)
    whole = (m for kind in kinds.values() if all(updates[m] == 0 for m in kind) for m in kind)
    return [module for module in whole if not _TOWERS.search(module)]


def sum_update_norms_by_layer(updates: UpdateNorms, get_scale: Callable[[str], float]) -> list[LayerUpdateNorm]:
    """Return how much each layer changes; modules outside of the layers count by their own name."""
    squared: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for module, norm in updates.items():
        if norm is not None and math.isfinite(norm):
            layer = match["layer"] if (match := _LAYER.match(module)) else module
            squared[layer] += (norm * get_scale(module)) ** 2
            counts[layer] += 1
    return [LayerUpdateNorm(layer, math.sqrt(squared[layer]), counts[layer]) for layer in squared]
