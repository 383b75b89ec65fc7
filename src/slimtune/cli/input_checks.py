"""Checks of the names and files that a command gets, before torch is imported, which takes seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SlimtuneError, UsageError, format_install_command

if TYPE_CHECKING:
    from ..core.adapters.config_fields import FieldError

ROW_SETTINGS = (
    "data.format", "data.columns", "data.ignore_columns", "data.train_on", "data.max_seq_len", "data.on_overlong",
    "data.chat_template",
)  # fmt: skip
"""The settings that say how rows are read: commands that read rows have the same flags for them."""
PACKAGES = {"multipart": "python-multipart"}
"""Packages that have another name than their module."""


def require_installed_packages(command: str, extra: str, modules: Iterable[str]) -> None:
    """Raise UsageError unless what a command imports is installed; nothing is imported.

    Args:
        command: its name.
        extra: the extra of slimtune that brings the packages.
        modules: what it imports of them.
    """
    if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
        message = f"{command} needs {' and '.join(PACKAGES.get(m, m) for m in missing)}, not installed here"
        raise UsageError(message, hint=format_install_command(extra))


def find_missing_inputs(
    tree: Mapping[str, Any], *, weights: bool = True, rows: bool = True
) -> tuple[list[FieldError], SlimtuneError | None]:
    """Return the errors for the base and the rows of a recipe's tree that do not exist, and what the base's raised.

    Args:
        tree: the recipe, with sections in long form and absolute paths.
        weights: whether the base is loaded; a plan needs only its config.
        rows: whether rows are read.
    """
    from ..core.adapters.config_fields import FieldError
    from ..core.config.recipe_loading import find_missing_data_files

    data, model = (tree[name] if isinstance(tree.get(name), Mapping) else {} for name in ("data", "model"))
    errors = find_missing_data_files(data) if rows else []
    try:
        if isinstance(name := model.get("name"), str) and name:
            require_base_exists(name, weights)
    except SlimtuneError as e:
        return [*errors, FieldError("model.name", e.message, e.expected)], e
    return errors, None


def require_base_exists(name: str, weights: bool = True) -> None:
    """Raise unless something has a base's name; with `weights`, unless it can have them."""
    from ..core.models.model_source import find_known_base, resolve_model_source

    if weights or not (os.path.exists(Path(name).expanduser()) or find_known_base(name)):
        resolve_model_source(name)


def require_run_exists(path: Path) -> None:
    """Raise unless there is a run, or an adapter folder, with an adapter whose base has not gone."""
    from ..core.config.recipe_loading import read_recipe_tree
    from ..core.foundation.files import read_json
    from ..core.training.run_dir import RunDir, find_adapter_folder

    if find_adapter_folder(path) != path:
        model = read_recipe_tree(RunDir(path).recipe_file).get("model")
        name = model.get("name") if isinstance(model, Mapping) else None
    else:
        file = path / "adapter_config.json"
        name = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    if isinstance(name, str) and name:
        require_base_exists(name)


def require_rows_exist(path: str | Path | None, format: str | None = None, *, run: Path | None = None) -> None:
    """Raise unless a file or folder of rows exists, if one is given; they have the format of a run, if one is given."""
    from ..core.config.recipe_loading import read_recipe_tree
    from ..core.training.run_dir import RunDir
    from ..extras.row_files import find_data_files

    if path is not None:
        if run is not None and (recipe := RunDir(run).recipe_file).is_file():
            data = read_recipe_tree(recipe).get("data")
            format = data.get("format") if isinstance(data, Mapping) else None
        find_data_files(Path(path), format)
