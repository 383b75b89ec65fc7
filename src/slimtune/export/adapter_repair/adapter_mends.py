"""Mends of an adapter's file: each finding of the check that has one is changed by a function of this module.

A mend changes names, the order of values and settings. It never invents a value: what was not saved stays lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...core.adapters.adapter_files import WEIGHTS_FILE
from ...core.adapters.adapter_tensors import PREFIX
from ...core.adapters.name_patterns import find_matching_pattern
from ...core.adapters.peft_config import write_adapter_config
from ...core.adapters.targets import strip_layer_prefixes_if_unambiguous
from ...core.foundation.json_results import JsonObject
from ...errors import AdapterError, UsageError, format_names, suggest
from ...extras.lora_conversion import make_lora_config_rank_fields
from ..adapter_check.adapter_findings import Mend
from ..adapter_check.base_findings import group_misshapen_keys
from ..adapter_check.check_file import FileCheck
from ..adapter_check.key_placement import (
    JOINED_PROJECTIONS,
    group_lora_pairs,
    list_adapter_names_in_keys,
    remove_wrappers,
    split_adapter_name,
)
from ..adapter_check.tensor_findings import list_modules_of_untrained_kinds
from ..expert_layouts import stack_split_experts

_OTHER_SELECTIONS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_PATTERNS = ("rank_pattern", "alpha_pattern")


class RepairAnswers(NamedTuple):
    """What a file does not say, and a person may know."""

    adapter_name: str | None = None  # which of several adapters in the file is meant
    alpha: float | None = None  # lora_alpha of the training


@dataclass
class AdapterContents:
    """An adapter's two files, while they are mended."""

    tensors: dict[str, Tensor]  # by key
    config: JsonObject  # adapter_config.json
    metadata: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write both files."""
        copies = {key: tensor.clone().contiguous() for key, tensor in self.tensors.items()}  # some share memory
        save_file(copies, folder / WEIGHTS_FILE, {"format": "pt", **self.metadata})
        write_adapter_config(folder, self.config)


def _select_adapter(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    names = list_adapter_names_in_keys(contents.tensors)
    if answers.adapter_name not in names:
        given = answers.adapter_name
        wrong = f", and {given!r} is none of them{suggest(given, names)}" if given else ""
        message = f"the file has {len(names)} adapters{wrong}"
        raise UsageError(message, f"one of {format_names(names)}", f"--adapter {names[0]}")
    split = {key: split_adapter_name(key) for key in contents.tensors}
    contents.tensors = {
        split[key][0]: tensor
        for key, tensor in contents.tensors.items()
        if split[key][1] in (answers.adapter_name, None)
    }


def _write_alpha(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    if answers.alpha is None:
        raise AdapterError(
            "nothing beside the tensors says the lora_alpha of the training: the update's scale is not known",
            "lora_alpha in adapter_config.json",
            "give the one of the training: --alpha 16",
        )
    contents.config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **contents.config, "lora_alpha": answers.alpha}
    if not check.adapter.config:
        ranks = [contents.tensors[a].shape[0] for a, _ in group_lora_pairs(contents.tensors).values() if a is not None]
        leaves = {module.rpartition(".")[2] for module in group_lora_pairs(contents.tensors)}
        contents.config |= {"r": max(ranks, default=1), "target_modules": sorted(leaves)}


def _rename_keys(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    placement = check.placement
    assert placement is not None
    names = placement.names
    for key in [key for key in contents.tensors if ".original_module." in key]:  # the base's own, of a raw state dict
        del contents.tensors[key]
    renamed = {names.get(key, key): tensor for key, tensor in contents.tensors.items()}
    if len(renamed) < len(contents.tensors):
        twice = [key for key, new in names.items() if new != key and new in contents.tensors]
        message = f"{format_names(twice, 2)} and the keys they would be renamed to are both in the file"
        raise AdapterError(message, "one tensor for each place", "take out those that are not meant")
    contents.tensors = renamed
    for field in _PATTERNS:
        patterns: Any = contents.config.get(field) or {}
        contents.config[field] = {_remove_wrappers_from_pattern(p): value for p, value in patterns.items()}


def _remove_wrappers_from_pattern(pattern: str) -> str:
    return remove_wrappers(f"{pattern}")[0].removeprefix(PREFIX)


def _stack_experts(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    stacked = stack_split_experts(contents.tensors, check.config, check.model)
    contents.tensors = stacked.tensors
    contents.config |= stacked.config_fields


def _transpose(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    assert check.placement is not None
    wrong = {*group_misshapen_keys(check.placement, check.adapter).get("transposed", ())}
    for pair in group_lora_pairs(contents.tensors).values():
        if wrong & {*pair}:  # a square matrix does not show it, and both of a module are written alike
            wrong |= {key for key in pair if key is not None and len({*contents.tensors[key].shape}) == 1}
    for key in wrong:
        contents.tensors[key] = contents.tensors[key].T


def _leave_out_untrained(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    pairs = group_lora_pairs(contents.tensors)
    for module in list_modules_of_untrained_kinds(check.updates):
        for key in pairs[module]:
            contents.tensors.pop(str(key), None)
    if check.config is not None and getattr(check.config, "target_parameters", None):
        left = group_lora_pairs(contents.tensors)
        if not any(".experts" in module for module in left):
            contents.config["target_parameters"] = None
    _select_modules(contents, check, answers)


def _select_modules(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    modules = dict(check.model.named_modules())
    found = (module.removeprefix(PREFIX) for module in group_lora_pairs(contents.tensors))
    linear = [name for name in found if name in modules and "weight" in modules[name]._parameters]
    contents.config["target_modules"] = strip_layer_prefixes_if_unambiguous(linear, check.model)
    contents.config |= dict.fromkeys(_OTHER_SELECTIONS)


def _read_ranks(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    pairs = {module.removeprefix(PREFIX): pair for module, pair in group_lora_pairs(contents.tensors).items()}
    alphas: Any = contents.config.get("alpha_pattern") or {}
    default = contents.config.get("lora_alpha")
    unused = [p for p, a in alphas.items() if a != default and not any(find_matching_pattern([p], m) for m in pairs)]
    if unused:
        raise AdapterError(
            f"alpha_pattern has entries that match no module with tensors: {format_names(unused)}; which modules were "
            "trained with these scales is not known",
            "patterns with the base's names of its modules",
            "correct them in a copy of adapter_config.json",
        )
    contents.config["alpha_pattern"] = {
        p: a for p, a in alphas.items() if any(find_matching_pattern([p], m) for m in pairs)
    }
    if not contents.config.get("target_parameters"):
        ranks = {module: contents.tensors[pair.a].shape[0] for module, pair in pairs.items() if pair.a is not None}
        fields = make_lora_config_rank_fields(ranks)
        contents.config |= {name: fields[name] for name in ("r", "rank_pattern")}


def _mark_flags(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    contents.config["use_dora"] = any("lora_magnitude_vector" in key for key in contents.tensors)
    contents.config["lora_bias"] = any(key.endswith("lora_B.bias") for key in contents.tensors)


def _swap_halves(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    assert check.placement is not None
    for key in group_misshapen_keys(check.placement, check.adapter).get("halves-swapped", ()):
        if ".lora_A" in key:
            other = key.replace(".lora_A", ".lora_B")
            contents.tensors[key], contents.tensors[other] = contents.tensors[other], contents.tensors[key]


def _convert_projections(contents: AdapterContents, check: FileCheck, answers: RepairAnswers) -> None:
    """Split the matrices of joined projections, or join those of split ones; the update stays the same."""
    assert check.placement is not None
    if contents.config.get("use_dora") or any(contents.config.get(field) for field in _PATTERNS):
        raise AdapterError(
            "the projections of a DoRA, or of a LoRA with rank or alpha patterns, cannot be converted",
            "one rank and one alpha for all modules",
            "merge it into the base that it was trained on",
        )
    modules = {key.partition(".lora_")[0] for key in check.placement.by_finding["projection-layout"]}
    of_base = dict(check.model.named_modules())
    for parent in sorted({module.rpartition(".")[0] for module in modules}):
        for joined, parts in JOINED_PROJECTIONS.items():
            there = [name for name in (joined, *parts) if f"{parent}.{name}" in modules]
            pairs = {
                name: tuple(contents.tensors.pop(f"{parent}.{name}.lora_{letter}.weight") for letter in "AB")
                for name in there
            }
            rows = {
                name: module.out_features
                for name in (joined, *parts)
                if (module := of_base.get(f"{parent}.{name}".removeprefix(PREFIX)))
            }
            if joined in pairs:
                A, B = pairs[joined]
                pairs = {part: (A, b) for part, b in zip(parts, B.split([rows[p] for p in parts]), strict=True)}
            elif pairs:
                pairs = {joined: _join_projections(pairs, parts, rows[joined], contents.config)}
            for name, pair in pairs.items():
                contents.tensors |= {f"{parent}.{name}.lora_{x}.weight": t for x, t in zip("AB", pair, strict=True)}
    _select_modules(contents, check, answers)
    _read_ranks(contents, check, answers)


def _join_projections(pairs: Mapping[str, Any], parts: Sequence[str], rows: int, config: JsonObject) -> Any:
    """Return A and B of `parts` one after the other, from those that are there; the scale follows from their rank."""
    absent = [part for part in parts if part not in pairs]
    left = rows - sum(len(B) for _, B in pairs.values())
    if left % max(len(absent), 1) or (len(absent) > 1 and parts[0] in absent):
        raise AdapterError(f"the rows of {format_names(absent)} in the base's projection are not known", "all of them")
    rank = sum(len(A) for A, _ in pairs.values())
    blocks, start = [], 0
    for part in parts:
        if part in absent:
            blocks.append(torch.zeros(left // len(absent), rank))
            continue
        A, B = pairs[part]
        factor = rank / len(A)  # the reader divides alpha by the joined rank, of rsLoRA by its root
        B = B * (factor**0.5 if config.get("use_rslora") else factor)
        blocks.append(torch.nn.functional.pad(B, (start, rank - start - len(A))))
        start += len(A)
    return torch.cat([pairs[part][0] for part in parts if part in pairs]), torch.cat(blocks).to(B.dtype)


MENDS: dict[Mend, Callable[[AdapterContents, FileCheck, RepairAnswers], None]] = {
    Mend.SELECT_ADAPTER: _select_adapter,
    Mend.GIVE_ALPHA: _write_alpha,
    Mend.RENAME_KEYS: _rename_keys,
    Mend.CONVERT_EXPERTS: _stack_experts,
    Mend.SPLIT_PROJECTIONS: _convert_projections,
    Mend.SWAP_HALVES: _swap_halves,
    Mend.TRANSPOSE: _transpose,
    Mend.LEAVE_OUT_UNTRAINED: _leave_out_untrained,
    Mend.SELECT_MODULES: _select_modules,
    Mend.READ_RANKS: _read_ranks,
    Mend.MARK_FLAGS: _mark_flags,
}
"""Mends of the file, in this order. The others depend on the engine: `repair_adapter.py`."""
