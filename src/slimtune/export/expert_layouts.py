"""Convert a LoRA of experts between a module for each expert, and one stacked parameter, as transformers has them.

    split     experts.3.gate_proj, .up_proj: A (r, in), B (mid, r) each;  experts.3.down_proj: A (r, mid), B (out, r)
    stacked   experts.gate_up_proj: A_e = [A_gate; A_up] (2r, in), B_e = [[B_gate, 0], [0, B_up]] (2 mid, 2r)
              experts.down_proj: A_e, B_e as they are

In a file A is ordered by expert, then by rank, and B by rank, then by expert (PEFT's ParamWrapper). A split expert
that the file lacks gets zeros. Scales stay what they were: the alpha of a parameter follows its rank.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.adapters.adapter_files import WEIGHTS_FILE, read_adapter_tensors_and_metadata
from ..core.adapters.adapter_tensors import PREFIX
from ..core.adapters.peft_config import CONFIG_FILE, PeftConfig, write_adapter_config
from ..core.foundation.files import read_json_object
from ..errors import AdapterError
from .adapter_check.key_placement import group_lora_pairs
from .export_support import Factors

_SPLIT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)")
_PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class StackedExperts(NamedTuple):
    """An adapter whose experts are stacked, and the fields of its config that change."""

    tensors: dict[str, Tensor]
    config_fields: dict[str, Any]


class _Update(NamedTuple):
    A: Tensor  # (r, in)
    B: Tensor  # (out, r), with the scale


def has_split_experts(folder: Path) -> bool:
    """Return whether an adapter's file has matrices of single experts."""
    with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
        return any(_SPLIT.fullmatch(module) for module in group_lora_pairs(dict.fromkeys(file.keys())))


def write_with_stacked_experts(folder: Path, model: nn.Module, out: Path) -> Path:
    """Write an adapter whose file has matrices of single experts as PEFT reads it on a base; return the folder."""
    tensors, metadata = read_adapter_tensors_and_metadata(folder)
    stacked = stack_split_experts(tensors, PeftConfig.from_pretrained(folder), model)
    out.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in stacked.tensors.items()}, out / WEIGHTS_FILE, metadata)
    write_adapter_config(out, {**read_json_object(folder / CONFIG_FILE), **stacked.config_fields})
    return out


def split_stacked_experts(module: str, stacked: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the updates of a stacked module by the names of its experts' matrices, `experts.3.gate_proj`.

    A matrix that the adapter does not change gets zeros: vLLM asks for all three of an expert.
    """
    split: dict[str, Factors] = {}
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        if name in stacked:
            A, B, scale = stacked[name]
        else:
            (other,) = stacked
            A, B, scale = stacked[other]
            inner, outer = (A.shape[2], B.shape[1]) if other == "down_proj" else (A.shape[2], B.shape[1] // 2)
            width, rows = (outer, 2 * inner) if other == "down_proj" else (outer, inner)
            A, B = A.new_zeros(*A.shape[:2], width), B.new_zeros(len(B), rows, B.shape[2])
        for expert, (a, b) in enumerate(zip(A, B, strict=True)):
            for part, rows_of_part in zip(parts, b.chunk(len(parts)), strict=True):
                split[f"{module}.{expert}.{part}"] = a, rows_of_part, scale
    return split


def stack_split_experts(tensors: Mapping[str, Tensor], config: Any, model: nn.Module) -> StackedExperts:
    """Return an adapter with the experts of modules of their own stacked; `model` is the base on the meta device.

    AdapterError: the file has experts that the base has not, or the base stores them in another order.
    """
    kept = dict(tensors)
    found: dict[str, dict[tuple[int, str], _Update]] = defaultdict(dict)
    for module, pair in group_lora_pairs(tensors).items():
        if (match := _SPLIT.fullmatch(module)) is None or None in pair:
            continue
        name = module.removeprefix(PREFIX)
        rank, alpha = config.get_rank(name), config.get_alpha(name)
        scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        A, B = (kept.pop(str(key)) for key in pair)
        projection = _PROJECTIONS.get(match["projection"], match["projection"])
        found[match["experts"]][int(match["index"]), projection] = _Update(A.float(), B.float() * scale)
    ranks: dict[str, int] = {}
    for module, updates in found.items():
        experts = _require_stacked_experts(model, module.removeprefix(PREFIX), updates)
        parameters = [n for n in experts._parameters if any(part in _PARTS[n] for _, part in updates)]
        for depth, name in enumerate(reversed(parameters)):  # PEFT nests the earlier parameter in the later one
            parameter: Any = experts._parameters[name]
            A, B = _stack(updates, _PARTS[name], parameter.shape)
            place = module + ".base_layer" * depth
            kept[f"{place}.lora_A.weight"], kept[f"{place}.lora_B.weight"] = A, B
            ranks[f"{module.rpartition('.')[2]}.{name}"] = A.shape[0] // parameter.shape[0]
    targets = [t for t in config.target_parameters or [] if not any(t.endswith(name) for name in ranks)]
    modules = config.target_modules
    if not isinstance(modules, str):
        modules = [m for m in modules or [] if not _is_of_experts_alone(m, kept)]
    fields = {"target_parameters": [*targets, *ranks], "target_modules": modules}
    for field, values in (("rank_pattern", ranks), ("alpha_pattern", _alphas_of_scale_1(ranks, config.use_rslora))):
        fields[field] = {**values, **{p: v for p, v in (getattr(config, field) or {}).items() if p not in values}}
    return StackedExperts(kept, fields)


def _is_of_experts_alone(target: str, kept: Mapping[str, Tensor]) -> bool:
    return not any(m.endswith(f".{target}") or m == PREFIX + target for m in group_lora_pairs(kept))


def _alphas_of_scale_1(ranks: Mapping[str, int], use_rslora: bool) -> dict[str, float]:
    return {name: math.sqrt(rank) if use_rslora else rank for name, rank in ranks.items()}


def _require_stacked_experts(model: nn.Module, name: str, updates: Mapping[tuple[int, str], _Update]) -> nn.Module:
    """Return the base's module of experts; raise AdapterError if it is not one that the updates fit."""
    try:
        experts = model.get_submodule(name)
    except AttributeError:
        raise AdapterError(f"the base has no {name}", "the experts of the base") from None
    shapes = {n: p.shape for n, p in experts._parameters.items() if p is not None}
    count = next((shape[0] for shape in shapes.values() if len(shape) == 3), 0)
    if getattr(experts, "is_transposed", False) or not shapes.keys() & _PARTS.keys():
        raise AdapterError(f"the base stores {name} as {format_shapes(shapes)}", "gate_up_proj and down_proj")
    if missing := [i for i, _ in updates if i >= count]:
        raise AdapterError(f"the file has an expert {max(missing)} of {name}, the base has {count}", "the same base")
    if unknown := sorted({part for _, part in updates} - {p for parts in _PARTS.values() for p in parts}):
        raise AdapterError(f"{name} has a matrix {unknown[0]!r} in the file", "gate_proj, up_proj and down_proj")
    return experts


def format_shapes(shapes: Mapping[str, Any]) -> str:
    """Return names with shapes, as text."""
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "no parameters"


def _stack(updates: Mapping[tuple[int, str], _Update], parts: tuple[str, ...], shape: Any) -> tuple[Tensor, Tensor]:
    """Return A `(experts · rank, in)` and B `(out, rank · experts)` of a parameter `(experts, out, in)`."""
    count, out, width = shape
    rank = max(u.A.shape[0] for (_, part), u in updates.items() if part in parts)
    A, B = torch.zeros(count, len(parts), rank, width), torch.zeros(count, out, len(parts), rank)
    rows = out // len(parts)
    for (index, part), update in updates.items():
        if part in parts:
            at, r = parts.index(part), update.A.shape[0]
            if update.A.shape[1] != width or update.B.shape[0] != rows:
                sizes = f"{update.B.shape[0]} × {update.A.shape[1]} in the file, {rows} × {width} on the base"
                raise AdapterError(f"the matrix {part} of expert {index} has another size: {sizes}", "the same base")
            A[index, at, :r] = update.A
            B[index, at * rows : (at + 1) * rows, at, :r] = update.B
    return A.reshape(-1, width), B.flatten(2).permute(1, 2, 0).reshape(out, -1)
