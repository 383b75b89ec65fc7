"""YAML as slimtune reads and writes it: without surprises, and within limits that a hostile file cannot pass."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError

from ...errors import RecipeError
from .formatting import format_short_value

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
                self._refuse(f"{format_short_value(key.value)} is given twice", key)
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
            self._refuse(f"{format_short_value(node.value)} is not of the type !!{kind}", node)

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
        value = line.partition(": ")[2].strip() or line.strip()  # YAML keeps some characters for itself
        quotes = f'; a text that begins with {value[0]} needs quotes: "{value}"' if value[:1] in tuple("*&!%@`") else ""
        hint = f"look at: {line.strip()[:80]}{quotes}"
        raise RecipeError(f"{place}: {e.problem or e.context}", "YAML", hint) from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that contains Unicode's line breaks, which YAML would otherwise fold into spaces."""


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, '"' if set(s) & set("\x85\u2028\u2029") else None)
)


def format_yaml(tree: Mapping[str, Any]) -> str:
    """Return a plain tree as YAML that reads back equal."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
