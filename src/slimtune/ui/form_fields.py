"""The fields of the forms: settings of the recipe, with help, limits and defaults of its schema."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.adapters.config_fields import SettingSpec, list_settings
from ..core.adapters.method_registry import list_methods
from ..core.config import Recipe
from ..core.config.objective_registry import list_objectives
from ..core.config.recipe_loading import parse_override_path_and_value
from ..core.foundation.strict_yaml import parse_yaml
from ..core.foundation.type_hints import describe_type_hint
from ..errors import SlimtuneError, UsageError, suggest
from .column_choices import make_column_flags_and_doubt
from .workspace import WorkspaceFolder

BASE, ROWS, MORE = "model.name", "data.train", "more"
OTHER_FIELDS = {
    BASE: "Base model",
    ROWS: "Rows",
    "output_dir": "New run",
    "data.columns": "the columns",
}
"""Label of each setting that is no field of settings."""
ROWS_FIELDS = {
    "data.format": "Format",
    "data.train_on": "Learned turns",
    "data.max_seq_len": "Longest row",
    "data.on_overlong": "Longer rows",
}
"""Label of each setting of the first page that changes how rows are read, beside the columns."""
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
"""Label of each setting that changes the run and has a field of its own: the objective on the first page, the others on
the second, whose last field, `more`, takes all others."""
NULL_MEANS = {"train.max_steps": "as many as the epochs have"}
"""What an empty field means where null is the default and the setting itself does not say it."""
NO_PLAN_FLAG = ("train.learning_rate", "data.validation_fraction")
"""The settings for which `slimtune plan` has no flag; `--set` takes them."""


class FormField(NamedTuple):
    """One field of a form."""

    setting: SettingSpec
    label: str
    options: Sequence[str]  # to choose from; empty: a text or a number
    is_number: bool
    default: str  # what an empty field means
    value: str  # what was chosen; empty: the default
    error: str  # what is wrong with the value; empty: nothing


def make_form_fields(
    labels_by_setting: Mapping[str, str], choices: Mapping[str, str], learning_rate: float | None = None
) -> list[FormField]:
    """Return the fields of settings with these labels.

    Args:
        labels_by_setting: the label of each setting.
        choices: what was chosen, by setting.
        learning_rate: what "auto" is for the run that was planned last; None: not known.
    """
    known = {s.path: s for s in list_settings(Recipe)}
    fields = []
    for path, label in labels_by_setting.items():
        setting, value = known[path], choices.get(path, "")
        is_number = not {int, float}.isdisjoint(setting.kinds)
        names = {"method.name": list_methods(), "task.name": list_objectives()}
        options = () if is_number else names.get(path, setting.list_choices())
        default = _describe_default(setting, learning_rate if path == "train.learning_rate" else None)
        fields.append(FormField(setting, label, options, is_number, default, value, find_value_error(path, value)))
    return fields


def _describe_default(setting: SettingSpec, automatic: float | None) -> str:
    """Return what an empty field means: a value, or what null means; `automatic` is what "auto" is."""
    if setting.default == "auto":
        return "automatic" if automatic is None else f"automatic ({automatic:g})"
    if setting.default is None:
        return NULL_MEANS.get(setting.path) or setting.when_null or "not set"
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def find_value_error(path: str, text: str) -> str:
    """Return what is wrong with a value as a person typed it, by the recipe's own checks; empty: nothing."""
    known = {s.path: s for s in list_settings(Recipe)}
    if not text.strip() or path not in known:
        return ""
    try:
        value = text if set(known[path].kinds) & {str, Path} else parse_yaml(text, path)
    except SlimtuneError as e:
        return e.message
    return (
        "" if known[path].find_error(known[path].read(value)) is None else f"It takes {_describe_values(known[path])}."
    )


def _describe_values(setting: SettingSpec) -> str:
    """Return what a person may type: without null and "auto", which an empty field means, and limits nobody reaches."""
    kinds = [kind for kind in setting.kinds if kind is not type(None)]
    kinds = [kind for kind in kinds if {int, float}.isdisjoint(kinds) or kind in (int, float)]
    words = " or ".join(describe_type_hint(kind, True, setting.list_choices()) for kind in kinds)
    return setting.takes or ", ".join(filter(None, (words, setting.limits)))


def make_args_except_base_and_rows(workspace: WorkspaceFolder, choices: Mapping[str, str], command: str) -> list[str]:
    """Return what is chosen, except base and rows, as arguments of `data`, `plan` or `train`.

    Raises:
        UsageError: a value is wrong, or a setting is not `PATH=VALUE`, unknown, or a path outside the working folder.
    """
    known = {s.path: s for s in list_settings(Recipe)}
    labels = ROWS_FIELDS if command == "data" else {**ROWS_FIELDS, **RUN_FIELDS}
    if wrong := [label for path, label in labels.items() if find_value_error(path, choices.get(path, ""))]:
        raise UsageError(f"{' and '.join(wrong)}: another value is needed", hint="each wrong field says what it takes")
    args = []
    for path in labels:
        if value := choices.get(path, "").strip():
            flag = f"--set={path}" if command == "plan" and path in NO_PLAN_FLAG else known[path].flag
            args.append(f"{flag}={value}")
    args += make_column_flags_and_doubt(choices)
    if command != "data":
        lines = filter(None, map(str.strip, choices.get(MORE, "").splitlines()))
        args += [f"--set={_check_setting(workspace, line, known)}" for line in lines]
    return args


def _check_setting(workspace: WorkspaceFolder, line: str, known: Mapping[str, SettingSpec]) -> str:
    """Return a setting as `PATH=VALUE`; what it names as a path is in the working folder."""
    path, value = parse_override_path_and_value(line)
    section = path.partition(".")[0]
    if path in (BASE, ROWS, "output_dir", "model.trust_remote_code"):
        reason = "code of a base runs only if a command in a terminal says so" if "trust" in path else "it has a field"
        raise UsageError(f"{path} cannot be set here: {reason}", "another setting")
    if path not in known and section not in ("method", "task"):
        message = f"there is no setting {path!r}{suggest(path, known)}"
        raise UsageError(message, "PATH=VALUE, as in docs/recipe.md", code="recipe-error")
    if path in known and Path in known[path].kinds and value is not None:
        return f"{path}={workspace.resolve_rows(str(value))}"
    if any(mark in str(value) for mark in ("/", "\\", "~")):
        raise UsageError(f"{path} got {value!r}, which looks like a path", "a value without / \\ ~")
    return line


FLAG = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)(?:[ =]('[^']*'|\"[^\"]*\"|[\w.=/:,{}-]*[\w}/]))?")
SETTING = re.compile(r"\b(?:model|data|task|method|train)\.[a-z_]+\b")
PAGE_FLAGS = {
    "force": "the box that trains in spite of it",
    "gpu": "Machine",
    "generate": "Answers to read",
    "resume": "Resume",
    "split": "Rows of its recipe",
}
"""What the page has in place of flags that are no settings."""


def name_page_fields(text: str) -> str:
    """Return a message of a command with the page's fields in place of its flags and settings.

    A flag of a setting without a field becomes the line that `More settings` takes.
    """
    known = {s.path: s for s in list_settings(Recipe)}
    labels = {**OTHER_FIELDS, **ROWS_FIELDS, **RUN_FIELDS}

    def name_flag(found: re.Match[str]) -> str:
        flag, value = found[1], found[2] or ""
        rest = found[0].removeprefix(f"--{flag}")
        if flag == "set" and "=" in value:
            return f"More settings: {value}"
        if flag == "column":
            return value.strip("'\"").replace("=", ": ") or "the columns"
        if flag in PAGE_FLAGS:
            return f"{PAGE_FLAGS[flag]}{rest}"
        setting = next((s for s in known.values() if s.flag in (f"--{flag}", f"--{flag.removeprefix('no-')}")), None)
        if setting is None:
            return found[0]
        is_value = bool(value) and (value in setting.list_choices() or bool(re.search(r"\d|^['\"]", value)))
        if setting.path in labels:
            return labels[setting.path] + (f": {value}" if is_value else rest)
        if bool in setting.kinds:
            return f"More settings: {setting.path}={str(not flag.startswith('no-')).lower()}{rest}"
        return f"More settings: {setting.path}{f'={value}' if is_value else rest}"

    return SETTING.sub(lambda found: labels.get(found[0], found[0]), FLAG.sub(name_flag, text))
