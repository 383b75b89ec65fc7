"""The fields of the forms: settings of the recipe, with help, limits and defaults of its schema."""

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.adapters.config_fields import SettingSpec, list_settings
from ..core.adapters.method_registry import list_methods
from ..core.config import Recipe
from ..core.config.objective_registry import list_objectives
from ..core.config.recipe_loading import parse_override
from ..errors import UsageError, nearest
from .workspace import WorkspaceFolder

BASE, ROWS, MORE = "model.name", "data.train", "more"
ROWS_FIELDS = {
    "data.format": "Format",
    "data.columns": "Columns",
    "data.train_on": "Learned turns",
    "data.max_seq_len": "Longest row",
    "data.on_overlong": "Longer rows",
}
"""Label of each setting of the first page: what changes how rows are read."""
RUN_FIELDS = {
    "task.name": "Objective",
    "method.name": "Method",
    "train.epochs": "Epochs",
    "train.max_steps": "Steps",
    "train.batch_size": "Batch size",
    "train.learning_rate": "Learning rate",
    "data.validation_fraction": "Validation share",
    "model.quantization": "Quantization",
}
"""Label of each setting of the second page that has a field of its own; its last field, `more`, takes all others."""
NO_FLAG = {
    "data": set(RUN_FIELDS),
    "plan": {"data.columns", "data.train_on", "data.on_overlong", "train.learning_rate", "data.validation_fraction"},
    "train": set(),
}
"""The settings for which a command has no flag; `--set` takes them."""


class FormField(NamedTuple):
    """One field of a form."""

    name: str  # the setting's dotted path
    label: str
    help: str
    options: Sequence[str]  # to choose from; empty: a text
    default: str  # shown where nothing is given
    kind: str  # "number" or "text"


def make_form_fields(labels: Mapping[str, str]) -> list[FormField]:
    """Return the fields of settings with these labels."""
    known = {s.path: s for s in list_settings(Recipe)}
    return [_make_field(known[path], label) for path, label in labels.items()]


def _make_field(setting: SettingSpec, label: str) -> FormField:
    names = {"method.name": list_methods, "task.name": list_objectives}
    options = list(names[setting.path]()) if setting.path in names else list(setting.choices)
    is_number = {int, float} & set(_members(setting.type))
    limits = f" ({setting.limits})" if setting.limits else ""
    default = "" if setting.default in (None, {}) else f"{setting.default}"
    return FormField(setting.path, label, setting.help + limits, options, default, "number" if is_number else "text")


def make_option_args(workspace: WorkspaceFolder, choices: Mapping[str, str], command: str) -> list[str]:
    """Return what is chosen, except base and rows, as arguments of `data`, `plan` or `train`.

    Raises:
        UsageError: a setting is not `PATH=VALUE`, unknown, or names a path outside the working folder.
    """
    known = {s.path: s for s in list_settings(Recipe)}
    args = []
    for path in ROWS_FIELDS if command == "data" else {**ROWS_FIELDS, **RUN_FIELDS}:
        value = choices.get(path, "").strip()
        # Columns are several values, `role=column` each.
        for part in (v.strip() for v in value.split(",")) if path == "data.columns" else [value]:
            if part and path in NO_FLAG[command]:
                args.append(f"--set={path}{'.' if path == 'data.columns' else '='}{part}")
            elif part:
                args.append(f"{known[path].flag}={part}")
    if command != "data":
        lines = filter(None, map(str.strip, choices.get(MORE, "").splitlines()))
        args += [f"--set={_check_setting(workspace, line, known)}" for line in lines]
    return args


def _check_setting(workspace: WorkspaceFolder, line: str, known: Mapping[str, SettingSpec]) -> str:
    """Return a setting as `PATH=VALUE`; what it names as a path is in the working folder."""
    path, value = parse_override(line)
    section = path.partition(".")[0]
    if path in (BASE, ROWS, "output_dir", "model.trust_remote_code"):
        reason = "code of a base runs only if a command in a terminal says so" if "trust" in path else "it has a field"
        raise UsageError(f"{path} cannot be set here: {reason}", "another setting")
    if path not in known and section not in ("method", "task"):
        raise UsageError(
            f"there is no setting {path!r}{nearest(path, known)}",
            "PATH=VALUE, as in docs/recipe.md",
            code="recipe-error",
        )
    takes_path = path in known and Path in _members(known[path].type)
    if takes_path and value is not None:
        return f"{path}={workspace.resolve_rows(str(value))}"
    if any(mark in str(value) for mark in ("/", "\\", "~")):
        raise UsageError(f"{path} got {value!r}, which looks like a path", "a value without / \\ ~")
    return line


def _members(hint: Any) -> Iterator[Any]:
    yield hint
    for member in typing.get_args(hint):
        yield from _members(member)
