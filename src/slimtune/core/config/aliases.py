"""Old names of settings, values and flags. Each works for one release and warns with its new name."""

import warnings
from typing import Any

from ...errors import RecipeError

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
"""Dotted paths of settings: old to new."""
VALUES = {("data.train_on", "all"): "assistant", ("data.train_on", "last"): "last_assistant"}
"""Values: (path, old value) to new value."""
FLAGS = {
    "--quant": "--quantization",
    "--learn": "--train-on",
    "--map": "--column",
    "--too-long": "--on-overlong",
    "--accumulate": "--gradient-accumulation-steps",
    "--checkpointing": "--gradient-checkpointing",
    "--no-checkpointing": "--no-gradient-checkpointing",
    "--offload": "--offload-activations",
    "--no-offload": "--no-offload-activations",
    "--tile": "--mlp-tile-size",
    "--seq-len": "--max-seq-len",
    "--continue": "--init-adapter",
    "--any-prompt": "--skip-prompt-test",
    "--general": "--general-text",
    "--as-lora": "--convert-to-lora",
    "--from": "--ollama-base",
}
"""Flags of all commands: old to new."""


def replace_deprecated_flags(args: list[str]) -> list[str]:
    """Return command-line arguments with old flags replaced; warn for each."""
    end = args.index("--") if "--" in args else len(args)
    renamed = []
    for arg in args[:end]:
        flag, equals, value = arg.partition("=")
        if flag in FLAGS:
            _warn(flag, FLAGS[flag])
        renamed.append(FLAGS.get(flag, flag) + equals + value)
    return renamed + args[end:]


def rename_setting(path: str, value: Any, source: str = "") -> tuple[str, Any]:
    """Return the path and the value of a setting by their current names; warn for each old name.

    What follows an old name stays: `data.map.messages` becomes `data.columns.messages`. `source` is the file that
    contains the setting, for the warning.
    """
    old = next((name for name in SETTINGS if path == name or path.startswith(f"{name}.")), None)
    if old is not None:
        _warn(old, SETTINGS[old], source)
        path = SETTINGS[old] + path[len(old) :]
    if isinstance(value, str) and (path, value) in VALUES:
        _warn(f"{path}={value}", f"{path}={VALUES[path, value]}", source)
        value = VALUES[path, value]
    return path, value


def rename_settings(tree: dict[str, Any], source: str = "") -> dict[str, Any]:
    """Return a recipe's tree (sections in long form) with old names replaced; warn for each.

    Raises:
        RecipeError: a setting is given by its old name and by its new one.
    """
    renamed: dict[str, Any] = {}
    for section, content in tree.items():
        prefix, given = "", {section: content}
        if isinstance(content, dict) and section not in SETTINGS:
            prefix, given = f"{section}.", content
        fields = renamed.setdefault(section, {}) if prefix else renamed
        for name, old_value in given.items():
            path, value = rename_setting(f"{prefix}{name}", old_value, source)
            if path.removeprefix(prefix) in fields:
                raise RecipeError(f"{source}: {prefix}{name} and its new name {path} are both given", "one of the two")
            fields[path.removeprefix(prefix)] = value
    return renamed


def _warn(old: str, new: str, source: str = "") -> None:
    where = f"{source}: " if source else ""
    warnings.warn(f"{where}{old} is an old name; use {new}", FutureWarning, stacklevel=2)
