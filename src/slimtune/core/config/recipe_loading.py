"""Reads recipe files and `path=value` overrides into a plain tree, and makes its paths absolute.

A relative path in a YAML file means the file beside it if there is one, else the file in the working folder.
"""

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import RecipeError, UsageError, suggest
from ..adapters.config_fields import list_settings
from ..foundation.chat_rendering import CHAT_TEMPLATES
from ..foundation.files import parse_hub_dataset_id_or_none
from ..foundation.formatting import format_short_value
from ..foundation.remote_code import allowing_remote_code, remote_code_allowed
from ..foundation.strict_yaml import parse_yaml
from .method_settings import NAMED_SECTIONS, map_method_setting_specs_by_name
from .objective_registry import set_objective_paths_absolute_in_place
from .schema import DataSettings, RecipeTree

SHORT_SECTIONS = {"model": "name", "data": "train", "task": "name", "method": "name"}
"""Sections that may be given as one plain value, and the field that the value sets."""
DATA_FILES = tuple(s.name for s in list_settings(DataSettings) if Path in s.kinds)
"""Fields of `data` that name files."""


def read_recipe_tree(path: str | Path | None, values_by_path: Mapping[str, Any] = MappingProxyType({})) -> RecipeTree:
    """Return the tree of a recipe file, empty without one, with overrides: sections in long form, absolute paths."""
    with allowing_remote_code(values_by_path.get("model.trust_remote_code") is True):
        tree = {} if path is None else _read_recipe_file(Path(path).expanduser())
    return replace_recipe_values(tree, values_by_path)


def _read_recipe_file(path: Path) -> RecipeTree:
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "a recipe file", f"name the file: {path}/recipe.yaml")
    if not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else []
        recipes = [p.name for p in siblings if p.suffix in (".yaml", ".yml")]
        raise UsageError(f"there is no recipe file {str(path)!r}{suggest(path.name, recipes)}", "a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RecipeError(f"{path} is not text: {e}", "a YAML file in UTF-8") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    if not isinstance(tree := parse_yaml(text, str(path)), dict | None):
        raise RecipeError(f"{path} is {format_short_value(tree)}", "a mapping with model, data and output_dir")
    tree = expand_section_shorthand(tree or {})
    set_recipe_paths_absolute_in_place(tree, path.absolute().parent)
    _check_trust(tree, path)
    return tree


def _check_trust(tree: RecipeTree, path: Path) -> None:
    """Set `model.trust_remote_code` to what the user says; what a file says does not count."""
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("trust_remote_code") not in (True, None):
        return
    if remote_code_allowed():
        model["trust_remote_code"] = True
    elif model.pop("trust_remote_code", None):
        message = f"{path}: model.trust_remote_code does not count in a file; only --trust-remote-code does"
        warnings.warn(message, UserWarning, stacklevel=2)


def expand_section_shorthand(tree: Mapping[str, Any]) -> RecipeTree:
    """Return the tree with `model: x` written as `model: {name: x}` and without empty sections."""
    return {
        name: {SHORT_SECTIONS[name]: value} if name in SHORT_SECTIONS and not isinstance(value, Mapping) else value
        for name, value in tree.items()
        if value is not None
    }


def parse_override_path_and_value(text: str) -> tuple[str, Any]:
    """Return path and value of `"path.to.field=value"`; the value is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set got {text!r}", "path.to.field=value", "for example --set train.epochs=1")
    return path.strip(), parse_yaml(value, f"--set {path.strip()}")


def replace_recipe_values(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> RecipeTree:
    """Return a recipe's tree with other values at dotted paths; a method setting's other spellings are dropped.

    Another method or task than the tree's starts from its own defaults: see `_drop_settings_of_replaced_in_place`.
    """
    changed = expand_section_shorthand(copy.deepcopy(dict(tree)))
    _drop_settings_of_replaced_in_place(changed, settings)
    fields = map_method_setting_specs_by_name(find_method_or_task_name("method", changed, settings))
    for path, value in settings.items():
        method, field = changed.get("method"), fields.get(path.removeprefix("method."))
        if path.startswith("method.") and isinstance(method, dict) and field is not None:
            # `--rank 8` overrides a file's `r: 16`. Without this the field would be given twice.
            changed["method"] = {k: v for k, v in method.items() if fields.get(k) is not field}
        set_tree_value(changed, path, value)
    return changed


def find_method_or_task_name(section: str, tree: RecipeTree, settings: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the name of the method or task that settings choose by dotted path, else a tree, else the default."""
    given = settings.get(f"{section}.name", settings.get(section, tree.get(section)))
    name = given.get("name") if isinstance(given, Mapping) else given
    return str(name or NAMED_SECTIONS[section][0].name).strip().lower()


def _drop_settings_of_replaced_in_place(tree: RecipeTree, settings: Mapping[str, Any]) -> None:
    """Drop a tree's settings of its method or task, and its learning rate, if settings choose another; warn of it.

    They were chosen for the one that is replaced: LoRA's rank means something else in VeRA, and its rate harms `full`.
    """
    for section in NAMED_SECTIONS:
        name, train = find_method_or_task_name(section, tree), tree.get("train")
        if find_method_or_task_name(section, tree, settings) == name:
            continue
        own = tree.pop(section, None)
        dropped = {f"{section}.{k}": v for k, v in own.items() if k != "name"} if isinstance(own, Mapping) else {}
        if isinstance(train, dict) and train.get("learning_rate", "auto") != "auto":
            dropped["train.learning_rate"] = train.pop("learning_rate")
        if unused := [f"{path} {format_short_value(v)}" for path, v in dropped.items() if path not in settings]:
            note = f"for its {section} {name} only; another {section} starts from its own defaults (--set changes them)"
            warnings.warn(f"the recipe's {', '.join(unused)} {'are' if unused[1:] else 'is'} {note}", stacklevel=2)


def set_tree_value(tree: RecipeTree, path: str, value: Any) -> None:
    """Set the value at a dotted path of a tree with sections in long form, in place; missing sections are created."""
    if path in SHORT_SECTIONS and not isinstance(value, Mapping):
        path = f"{path}.{SHORT_SECTIONS[path]}"
    # A third part is a key of a mapping and may contain dots: method.rank_pattern.layers.0.q_proj
    *sections, name = path.split(".", 2)
    parent = tree
    for section in sections:
        inner = {} if parent.get(section) is None else parent[section]
        if not isinstance(inner, Mapping):
            raise RecipeError(f"--set {path}: {section!r} is {format_short_value(inner)}", "a path through sections")
        parent[section] = parent = dict(inner)
    parent[name] = value


def set_recipe_paths_absolute_in_place(tree: RecipeTree, folder: Path | None = None) -> None:
    """Make the paths of data, model and task absolute, in place.

    Paths are looked up in `folder`, where those that do not exist stay as they are; None: the working folder.
    """

    def locate(path: str) -> str:
        return os.path.abspath(os.path.join(folder or "", os.path.expanduser(path)))

    data, model = (tree[name] if isinstance(tree.get(name), dict) else {} for name in ("data", "model"))
    for name in DATA_FILES:
        path = data.get(name)
        if not isinstance(path, str) or not path or (name == "chat_template" and path in CHAT_TEMPLATES.names()):
            continue
        if os.path.exists(locate(path)) or (folder is None and parse_hub_dataset_id_or_none(path) is None):
            data[name] = locate(path)
    set_objective_paths_absolute_in_place(tree.get("task"), folder)
    # A bare word is an alias even if a folder has that name. A Hub id stays as it is if no such folder exists.
    path = model.get("name")
    if isinstance(path, str) and ("/" in path or path.endswith(".gguf")) and os.path.exists(locate(path)):
        model["name"] = locate(path)
