"""Checks of the names and files that a command gets, before torch is imported, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SlimtuneError
from .row_checks import require_valid_first_rows

if TYPE_CHECKING:
    from ..core.adapters.config_fields import FieldError


def list_missing_base_and_data_errors(
    recipe_tree: Mapping[str, Any], *, need_weights: bool = True, need_rows: bool = True
) -> list[FieldError]:
    """Return the errors for the base and the rows of a recipe's tree that do not exist.

    Args:
        recipe_tree: the recipe, with sections in long form and absolute paths.
        need_weights: whether the base is loaded; a plan needs only its config.
        need_rows: whether rows are read.
    """
    from ..core.adapters.config_fields import FieldError
    from ..extras.row_files import list_missing_data_file_errors

    errors = list_missing_data_file_errors(recipe_tree) if need_rows else []
    try:
        if isinstance(name := recipe_tree.get("model", {}).get("name"), str) and name:
            require_base_exists(name, need_weights)
    except SlimtuneError as e:
        errors.append(FieldError("model.name", e.message, e.expected, cause=e))
    return errors


def require_base_exists(name: str, need_weights: bool = True) -> None:
    """Raise unless something has a base's name; with `need_weights`, unless it can have them."""
    from ..core.models.model_source import find_known_base, resolve_model_source

    if need_weights or not (os.path.exists(Path(name).expanduser()) or find_known_base(name)):
        resolve_model_source(name)


def require_run_and_base_exist(path: Path) -> None:
    """Raise unless there is a run, or an adapter folder, with an adapter whose base has not gone."""
    from ..core.foundation.files import read_json_object
    from ..core.training.run_dir import RunDir, find_adapter_folder

    file = path / "adapter_config.json"
    if find_adapter_folder(path) != path:
        require_base_exists(RunDir(path).load_recipe().model.name)
    elif file.is_file() and isinstance(name := read_json_object(file).get("base_model_name_or_path"), str) and name:
        require_base_exists(name)


def require_row_files_exist(
    path: str | Path | None, format: str | None = None, *, run_giving_format: Path | None = None
) -> None:
    """Raise unless a file or folder of rows exists, if one is given; for a run also unless it can learn from them."""
    from ..core.training.run_dir import RunDir
    from ..extras.row_files import list_dataset_file_names_with_readers

    if path is not None:
        run = RunDir(run_giving_format) if run_giving_format is not None else None
        recipe = run.load_recipe() if run is not None and run.recipe_file.is_file() else None
        list_dataset_file_names_with_readers(Path(path), format if recipe is None else recipe.data.format)
        if recipe is not None:
            require_valid_first_rows(recipe.data, recipe.objective(), [Path(path)])
