"""PEFT's functions on target modules, under PEFT's names."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.adapters.targets import (
    ALL_LINEAR,
    find_tied_embedding_names,
    get_base_modules,
    is_target_module,
    list_all_linear_targets,
    matches_regex_or_names,
    strip_layer_prefixes_if_unambiguous,
)
from ..errors import UsageError, format_names


def _get_module_names_tied_with_embedding(model: Any) -> list[str]:
    """Return the names of the modules tied to the input embedding, sorted (PEFT's name)."""
    return sorted(find_tied_embedding_names(model)[1:])


def check_target_module_exists(config: Any, key: str) -> bool:
    """Return whether a config's target_modules, without what it excludes or trains in full, match a module's name."""
    whole = config.modules_to_save or []
    parts = key.split(".")
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]  # and the name itself
    if any(matches_regex_or_names([name], parent) for name in whole for parent in parents):
        return False
    return is_target_module(key, config, config.target_modules or [])


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace "all-linear" in a config by the ends of the names that it stands for; return the config (PEFT's name)."""
    if str(peft_config.target_modules).lower() == ALL_LINEAR:
        peft_config.target_modules = set(
            strip_layer_prefixes_if_unambiguous(list_all_linear_targets(model, peft_config), model)
        )
    return peft_config


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the names of the modules of a PeftModel that an adapter changes, "matched", and of the others."""
    kinds = tuner.model.match_report(adapter_name).kinds
    names = [name for name in get_base_modules(tuner.model) if name]
    return {"matched": [n for n in names if n in kinds], "unmatched": [n for n in names if n not in kinds]}


def _find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """Return the shortest ends of names that match all targets and none of the other modules (PEFT's name).

    Raises:
        UsageError: there are no targets, one is empty or the text itself, or one is among the other modules.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise UsageError("target_modules should be a list or set of strings.")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise UsageError("target_modules should not contain an empty string.")
    if both := sorted(targets & others):
        message = "target_modules and other_module_names contain common elements, this should not happen"
        raise UsageError(f"{message}: {format_names(both)}")
    taken = {end for name in others for end in _name_ends(name)}
    found: set[str] = set()
    for name in sorted(targets, key=_name_ends):
        if not any(name == end or name.endswith(f".{end}") for end in found):
            found |= {next((end for end in _name_ends(name) if end not in taken), name)}
    return found


def _name_ends(name: str) -> list[str]:
    """Return the ends of a name, shortest first: c, b.c and a.b.c."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
