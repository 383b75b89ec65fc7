"""From text to a plain tree: YAML with its faults placed, `path=value` overrides, and paths made absolute.

A relative path in a YAML file means the file beside that YAML if there is one, else the one in the working folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from ..errors import RecipeError, UsageError, nearest
from ..utils.dataset_id import parse_dataset_id
from .aliases import rename_settings
from .errors import format_value

SHORT = {"model": "name", "data": "train", "method": "name"}
"""Sections that may be written as one plain value, and the field that value is."""
DATA_FILES = ("train", "validation", "test", "chat_template")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `2e-4` is a number, and a key given twice is a fault, not silently the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


# YAML 1.1 wants a dot in a float, and PyYAML follows it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, source: str) -> Any:
    """Return what a YAML text says.

    Raises:
        RecipeError: it does not parse; source, line, column and the text of the line are given.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        if mark is None:
            raise RecipeError(f"{source} is not YAML: {e}") from None
        lines = text.splitlines()
        # At the end of the text the mark stands one line past it.
        line = lines[min(mark.line, len(lines) - 1)] if lines else ""
        raise RecipeError(
            f"{source}, line {mark.line + 1}, column {mark.column + 1}: {e.problem or e.context}",
            "YAML",
            f"look at: {line.strip()}",
        ) from None
    except yaml.YAMLError as e:
        raise RecipeError(f"{source} is not YAML: {' '.join(str(e).split())}") from None


def read_tree(path: Path) -> dict[str, Any]:
    """Return the tree of a recipe file, its sections in long form and its paths placed.

    Raises:
        UsageError: there is no such file; the nearest name beside it is given.
        RecipeError: it is not YAML, or not a mapping.
    """
    if not path.is_file():
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "a recipe file", f"say which file: {path}/recipe.yaml")
        beside = (
            [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")] if path.parent.is_dir() else []
        )
        raise UsageError(f"there is no recipe file {str(path)!r}{nearest(path.name, beside)}", "a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RecipeError(f"{path} is not text: {e}", "a YAML file in UTF-8") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    tree = parse(text, str(path))
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path} holds {format_value(tree)}", "a mapping with model, data and output_dir")
    tree = rename_settings(expand(tree or {}), str(path))
    resolve_paths(tree, path.absolute().parent)
    return tree


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with `model: x` written as `model: {name: x}`, and sections that hold nothing left out."""
    return {
        name: {SHORT[name]: value} if name in SHORT and not isinstance(value, Mapping) else value
        for name, value in tree.items()
        if value is not None
    }


def read_override(text: str) -> tuple[str, Any]:
    """Return `(path, value)` of `"path.to.field=value"`; the value is read as YAML.

    Raises:
        RecipeError: there is no `=`, no path, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set got {text!r}", "path.to.field=value", "for example --set train.epochs=1")
    return path.strip(), parse(value, f"--set {path.strip()}")


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `tree["a"]["b"]` for the path `"a.b"`, in place; a text value is read as YAML (`"3"` is a number).

    Raises:
        RecipeError: the value is not YAML, or the path goes through a field that is no section.
    """
    set_field(tree, path, parse(value, f"--set {path}") if isinstance(value, str) else value)


def set_field(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path as it is, in place; sections are made as needed.

    Raises:
        RecipeError: the path goes through a field that is no section.
    """
    if path in SHORT and not isinstance(value, Mapping):
        path = f"{path}.{SHORT[path]}"
    # A third part is a key of a mapping and may hold dots itself: method.rank_pattern.layers.0.q_proj
    *sections, name = path.split(".", 2)
    at = tree
    for section in sections:
        inner = at.get(section)
        if inner is None:
            inner = {}
        elif not isinstance(inner, Mapping):
            inner = {SHORT[section]: inner} if at is tree and section in SHORT else inner
        if not isinstance(inner, Mapping):
            raise RecipeError(f"--set {path}: {section!r} is {format_value(inner)}", "a path through sections")
        at[section] = dict(inner)
        at = at[section]
    at[name] = value


def resolve_paths(tree: dict[str, Any], folder: Path | None = None) -> None:
    """Make the paths of data and model absolute, in place, so that a run is read the same from any working folder.

    Args:
        tree: sections in long form.
        folder: look here; paths that do not exist here are left as they are. None: they are the working folder's.
    """
    data, model = tree.get("data"), tree.get("model")
    if isinstance(data, dict):
        for name in DATA_FILES:
            if isinstance(path := data.get(name), str) and path:
                placed = os.path.abspath(os.path.join(folder or "", os.path.expanduser(path)))
                if os.path.exists(placed) or (folder is None and parse_dataset_id(path) is None):
                    data[name] = placed
    if isinstance(model, dict) and isinstance(path := model.get("name"), str):
        # A bare word is an alias even where a folder of that name happens to stand here; a Hub id is no path.
        placed = os.path.abspath(os.path.join(folder or "", os.path.expanduser(path)))
        if ("/" in path or path.endswith(".gguf")) and os.path.exists(placed):
            model["name"] = placed
