"""Reads YAML and `path=value` overrides into a plain tree, and makes its paths absolute.

A relative path in a YAML file means the file beside it if there is one, else the file in the working folder.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError

from ...errors import RecipeError, UsageError, nearest
from ..adapters.config_fields import FieldError, format_value
from ..foundation.files import parse_dataset_id
from ..foundation.remote_code import remote_code_allowed

SHORT_SECTIONS = {"model": "name", "data": "train", "task": "name", "method": "name"}
"""Sections that may be given as one plain value, and the field that the value sets."""
DATA_FILES = ("train", "validation", "test", "general_text", "chat_template")
"""Fields of `data` that name files."""


MAX_DEPTH, MAX_KEYS, MAX_VALUES, MAX_DIGITS = 40, 10_000, 200_000, 300
"""Limits of a YAML text: levels of nesting, keys of a mapping, values with aliases written out, digits of a number."""


class _Loader(yaml.SafeLoader):
    """Reads `2e-4` as a number and dates as text; raises for keys that are no text or given twice, and past a limit."""

    depth = size = 0

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.sizes: dict[int, int] = {}  # values in each node, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels of nesting", parent)
        if isinstance(parent, yaml.MappingNode) and len(parent.value) == MAX_KEYS:
            self._refuse(f"more than {MAX_KEYS} keys in one mapping", parent)
        self.depth += 1
        before, is_alias = self.size, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.size += self.sizes.get(id(node), 1) if is_alias else 1
        if not is_alias:
            self.sizes[id(node)] = self.size - before
        if self.size > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES} values", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag.endswith(":merge"):
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                self._refuse("a key that is not text: put it in quotes", key)
            if key.value in seen:
                self._refuse(f"{format_value(key.value)} is given twice", key)
            seen.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":str"):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            self._refuse(f"a number of {len(node.value)} characters", node)
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError):  # PyYAML trusts a tag such as !!int
            self._refuse(f"{format_value(node.value)} is not of the type !!{kind}", node)

    def _refuse(self, problem: str, node: Any) -> NoReturn:
        raise ComposerError(None, None, problem, node.start_mark)


# YAML 1.1 requires a dot in a float, and PyYAML follows it.
_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text; the error for one that does not parse quotes the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None) or getattr(e, "context_mark", None)
        if not isinstance(e, yaml.MarkedYAMLError) or mark is None:
            raise RecipeError(f"{source} is not YAML: {' '.join(str(e).split())}") from None
        lines = text.splitlines() or [""]
        line = lines[min(mark.line, len(lines) - 1)]  # at the end of the text the mark is one line past it
        place = f"{source}, line {mark.line + 1}, column {mark.column + 1}"
        hint = f"look at: {line.strip()[:80]}{_quote_hint(line)}"
        raise RecipeError(f"{place}: {e.problem or e.context}", "YAML", hint) from None


def read_recipe_tree(path: Path) -> dict[str, Any]:
    """Return the tree of a recipe file: sections in long form, absolute paths."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "a recipe file", f"name the file: {path}/recipe.yaml")
    if not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else []
        recipes = [p.name for p in siblings if p.suffix in (".yaml", ".yml")]
        raise UsageError(f"there is no recipe file {str(path)!r}{nearest(path.name, recipes)}", "a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RecipeError(f"{path} is not text: {e}", "a YAML file in UTF-8") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path} is {format_value(tree)}", "a mapping with model, data and output_dir")
    tree = expand_short_sections(tree or {})
    make_recipe_paths_absolute(tree, path.absolute().parent)
    _check_trust(tree, path)
    return tree


def _check_trust(tree: dict[str, Any], path: Path) -> None:
    """Set `model.trust_remote_code` to what the user says; what a file says does not count."""
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("trust_remote_code") not in (True, None):
        return
    if remote_code_allowed():
        model["trust_remote_code"] = True
    elif model.pop("trust_remote_code", None):
        message = f"{path}: model.trust_remote_code does not count in a file; only --trust-remote-code does"
        warnings.warn(message, UserWarning, stacklevel=2)


def expand_short_sections(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree with `model: x` written as `model: {name: x}` and without empty sections."""
    return {
        name: {SHORT_SECTIONS[name]: value} if name in SHORT_SECTIONS and not isinstance(value, Mapping) else value
        for name, value in tree.items()
        if value is not None
    }


def parse_override(text: str) -> tuple[str, Any]:
    """Return path and value of `"path.to.field=value"`; the value is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set got {text!r}", "path.to.field=value", "for example --set train.epochs=1")
    return path.strip(), parse_yaml(value, f"--set {path.strip()}")


def parse_overrides(overrides: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Return values by dotted path, of which `["path=value"]` are read as YAML."""
    given = overrides.items() if isinstance(overrides, Mapping) else [parse_override(text) for text in overrides]
    return dict(given)


def set_tree_value(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, in place; missing sections are created."""
    if path in SHORT_SECTIONS and not isinstance(value, Mapping):
        path = f"{path}.{SHORT_SECTIONS[path]}"
    # A third part is a key of a mapping and may contain dots: method.rank_pattern.layers.0.q_proj
    *sections, name = path.split(".", 2)
    parent = tree
    for section in sections:
        inner = parent.get(section)
        if inner is None:
            inner = {}
        elif parent is tree and section in SHORT_SECTIONS and not isinstance(inner, Mapping):
            inner = {SHORT_SECTIONS[section]: inner}
        if not isinstance(inner, Mapping):
            raise RecipeError(f"--set {path}: {section!r} is {format_value(inner)}", "a path through sections")
        parent[section] = dict(inner)
        parent = parent[section]
    parent[name] = value


def make_recipe_paths_absolute(tree: dict[str, Any], folder: Path | None = None) -> None:
    """Make the paths of data and model absolute, in place.

    Paths are looked up in `folder`, where those that do not exist stay as they are; None: the working folder.
    """

    def locate(path: str) -> str:
        return os.path.abspath(os.path.join(folder or "", os.path.expanduser(path)))

    data, model = (tree[name] if isinstance(tree.get(name), dict) else {} for name in ("data", "model"))
    for name in DATA_FILES:
        path = data.get(name)
        if not isinstance(path, str) or not path:
            continue
        if os.path.exists(locate(path)) or (folder is None and parse_dataset_id(path) is None):
            data[name] = locate(path)
    path = model.get("name")
    # A bare word is an alias even if a folder has that name. A Hub id stays as it is if no such folder exists.
    if isinstance(path, str) and ("/" in path or path.endswith(".gguf")) and os.path.exists(locate(path)):
        model["name"] = locate(path)


def _quote_hint(line: str) -> str:
    """Return what to do where a value begins with a character that YAML keeps for itself, such as a pattern's star."""
    value = line.partition(": ")[2].strip() or line.strip()
    return f'; a text that begins with {value[0]} needs quotes: "{value}"' if value[:1] in tuple("*&!%@`") else ""


def find_missing_files(data: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors for the files of a `data` section that do not exist; the Hub's datasets are not looked up."""
    errors = []
    for name in DATA_FILES:
        if not isinstance(given := data.get(name), str | Path) or not str(given):
            continue
        path, is_rows = Path(given), name not in ("general_text", "chat_template")
        if path.is_file() or (is_rows and (path.is_dir() or parse_dataset_id(path))):
            continue
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        errors.append(FieldError(f"data.{name}", f"there is no file {str(path)!r}{nearest(path.name, siblings)}"))
    return errors


class _Dumper(yaml.SafeDumper):
    """Quotes text that contains Unicode's line breaks, which YAML would otherwise fold into spaces."""


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, '"' if set(s) & set("\x85\u2028\u2029") else None)
)


def format_yaml(tree: Mapping[str, Any]) -> str:
    """Return a plain tree as YAML that reads back equal."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
