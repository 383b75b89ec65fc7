"""Old names of settings, values and flags. Each still works for one release and warns with its new name."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import RecipeError

SETTINGS = {
    "out": "output_dir",
    "model.quant": "model.quantization",
    "data.learn": "data.train_on",
    "data.map": "data.columns",
    "data.too_long": "data.on_overlong",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.tokens_at_once": "train.max_tokens_per_micro_batch",
    "train.share_beginnings": "train.share_prefix",
    "train.offload_checkpoints": "train.offload_activations",
    "train.tile_tokens": "train.mlp_tile_size",
    "train.shard_base": "train.fsdp",
    "train.scheduler": "train.lr_scheduler",
    "train.eval_every": "train.eval_steps",
    "train.save_every": "train.save_steps",
    "train.log_every": "train.logging_steps",
    "train.keep_checkpoints": "train.save_total_limit",
    "train.early_stopping": "train.early_stopping_patience",
}
"""Old dotted path of a setting → its path now."""

VALUES = {("data.train_on", "all"): "assistant", ("data.train_on", "last"): "last_assistant"}
"""(path now, old value) → the value now."""


def rename_setting(path: str, value: Any, source: str = "") -> tuple[str, Any]:
    """Return the path and the value of a setting by their names now; warn where one of them was an old name.

    Args:
        path: a dotted path; what follows an old name is kept (`data.map.messages`).
        value: the value given for it.
        source: the file it stands in, for the warning.
    """
    old = next((name for name in SETTINGS if path == name or path.startswith(f"{name}.")), None)
    now = path if old is None else SETTINGS[old] + path[len(old) :]
    if old is not None:
        _warn(old, SETTINGS[old], source)
    if isinstance(value, str) and (now, value) in VALUES:
        _warn(f"{now}={value}", f"{now}={VALUES[now, value]}", source)
        value = VALUES[now, value]
    return now, value


def rename_settings(tree: dict[str, Any], source: str = "") -> dict[str, Any]:
    """Return a recipe's tree (sections in long form) with every old name replaced; warn for each.

    Raises:
        RecipeError: a setting is given by its old name and by its new one.
    """
    renamed: dict[str, Any] = {}
    for section, content in tree.items():
        if not isinstance(content, dict) or section in SETTINGS:
            name, renamed_value = rename_setting(str(section), content, source)
            _add(renamed, name, renamed_value, str(section), source)
            continue
        renamed[section] = {}
        for name, value in content.items():
            path, new_value = rename_setting(f"{section}.{name}", value, source)
            _add(renamed[section], path.partition(".")[2], new_value, f"{section}.{name}", source)
    return renamed


def _add(fields: dict[str, Any], name: str, value: Any, old: str, source: str) -> None:
    if name in fields:
        raise RecipeError(f"{source}: {old} and its new name {name} are both given", "one of the two")
    fields[name] = value


def _warn(old: str, new: str, source: str) -> None:
    where = f"{source}: " if source else ""
    warnings.warn(f"{where}{old!r} is an old name; use {new!r}", FutureWarning, stacklevel=2)
