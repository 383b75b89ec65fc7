"""What the forms choose, as arguments of the commands."""

from collections.abc import Mapping
from pathlib import Path

from ..core.config.recipe_loading import parse_override_path_and_value
from ..errors import UsageError, suggest
from .column_choices import make_column_arguments
from .form_fields import BASE, MORE, ROWS, ROWS_FIELDS, RUN_FIELDS, SETTINGS, find_value_error
from .workspace import WorkspaceFolder

NO_PLAN_FLAG = ("train.learning_rate", "data.validation_fraction", "data.test_fraction")
"""The settings for which `slimtune plan` has no flag; `--set` takes them."""


def make_args_except_base_and_rows(workspace: WorkspaceFolder, choices: Mapping[str, str], command: str) -> list[str]:
    """Return what is chosen, except base and rows, as arguments of `data`, `plan` or `train`.

    Raises:
        UsageError: a value is wrong, or a setting is not `PATH=VALUE`, unknown, or a path outside the working folder.
    """
    labels = ROWS_FIELDS if command == "data" else {**ROWS_FIELDS, **RUN_FIELDS}
    if wrong := [label for path, label in labels.items() if find_value_error(path, choices.get(path, ""))]:
        raise UsageError(f"{' and '.join(wrong)}: another value is needed", hint="each wrong field says what it takes")
    args = []
    for path in labels:
        if value := choices.get(path, "").strip():
            flag = f"--set={path}" if command == "plan" and path in NO_PLAN_FLAG else SETTINGS[path].flag
            args.append(f"{flag}={value}")
    args += make_column_arguments(choices)
    if command != "data":
        lines = filter(None, map(str.strip, choices.get(MORE, "").splitlines()))
        args += [f"--set={_check_setting(workspace, line)}" for line in lines]
    return args


def _check_setting(workspace: WorkspaceFolder, line: str) -> str:
    """Return a setting as `PATH=VALUE`; what it names as a path is in the working folder."""
    path, value = parse_override_path_and_value(line)
    section = path.partition(".")[0]
    if path in (BASE, ROWS, "output_dir", "model.trust_remote_code"):
        reason = "code of a base runs only if a command in a terminal says so" if "trust" in path else "it has a field"
        raise UsageError(f"{path} cannot be set here: {reason}", "another setting")
    if path not in SETTINGS and section not in ("method", "task"):
        message = f"there is no setting {path!r}{suggest(path, SETTINGS)}"
        raise UsageError(message, "PATH=VALUE, as in docs/recipe.md", code="recipe-error")
    if path in SETTINGS and Path in SETTINGS[path].kinds and value is not None:
        return f"{path}={workspace.resolve_rows(str(value))}"
    if any(mark in str(value) for mark in ("/", "\\", "~")):
        raise UsageError(f"{path} got {value!r}, which looks like a path", "a value without / \\ ~")
    return line
