"""Make a recipe of another trainer's config, and account for each of its fields: `slimtune import`.

    the file's fields → its trainer, recognized by its fields → a rule for each field → a recipe, checked as any other

Where the file leaves out what decides the result (learning rate, rank, alpha, epochs, batch, lengths), the other
trainer's default is written, and said: ours is another.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from ...core.config.recipe import Recipe
from ...core.config.schema import RecipeTree
from ...core.foundation.files import write_atomic
from ...core.foundation.json_results import JsonObject
from ...core.foundation.strict_yaml import format_yaml
from ...errors import RecipeError, UsageError, format_names, suggest
from . import axolotl, llama_factory, mlx_lm, ms_swift, trl_arguments, unsloth
from .field_rules import FieldOutcome, Outcome, Rule
from .source_file import SourceFile, read_source_file


class SourceFormat(Protocol):
    """A module of a trainer's format."""

    NAME: str
    MARKS: frozenset[str]
    """Fields that hardly another trainer has."""
    RULES: Mapping[str, Rule]
    DEFAULTS: Mapping[str, Any]
    """JsonObject of fields that decide the result, where the file leaves them out; they go through the same rules."""

    @staticmethod
    def prepare(source: SourceFile) -> SourceFile:
        """Return the fields as the rules expect them; RecipeError if slimtune cannot train such a thing."""


SOURCES: Mapping[str, Any] = MappingProxyType({
    module.NAME: module for module in (llama_factory, axolotl, ms_swift, trl_arguments, mlx_lm, unsloth)
})  # fmt: skip


@dataclass(frozen=True)
class ImportedField:
    """What became of one field of the other trainer's config."""

    field: str
    """Its name there."""
    value: str
    """Its value, as JSON."""
    outcome: Outcome
    """Whether it was taken."""
    settings: list[str]
    """The recipe's settings that it became."""
    reason: str
    """Why it was not taken; or what to look at."""
    is_default: bool
    """Whether the file leaves it out, and the other trainer's default was taken."""


@dataclass(frozen=True)
class ImportResult:
    """What `import --json` prints."""

    file: str
    """The file that was read."""
    source: str
    """The trainer that it is for."""
    out: str
    """The recipe that was written."""
    fields: list[ImportedField]
    """Each of its fields, then the defaults that were written."""
    not_in_file: list[str]
    """Settings of the recipe that the file does not say, and you have to write."""

    def lines(self) -> Iterator[str]:
        """Yield the fields by their outcome, for people."""
        yield f"{self.file}: a config of {self.source}"
        titles = {
            "taken": "taken", "no-equivalent": "without equivalent", "unknown": "unknown", "not-needed": "not needed"
        }  # fmt: skip
        for outcome, title in titles.items():
            found = [f for f in self.fields if f.outcome == outcome and not f.is_default]
            if found:
                yield ""
                yield f"{title}:"
            for f in found:
                target = f"  →  {', '.join(f.settings)}" if f.settings else ""
                yield f"  {f.field}: {f.value}{target}{f'  ({f.reason})' if f.reason else ''}"
        if self.not_in_file:
            yield ""
            yield f"not in the file, write it into the recipe: {', '.join(self.not_in_file)}"
        if defaults := [f for f in self.fields if f.is_default and f.settings]:
            yield ""
            yield f"left out there; the defaults of {self.source} are written:"
            yield from (f"  {f.field}: {f.value}  →  {', '.join(f.settings)}" for f in defaults)


def import_config(file: Path, out: Path, source: str | None = None) -> ImportResult:
    """Write a recipe of another trainer's config.

    Args:
        file: YAML, JSON, a shell script with a command line; for Unsloth a folder or an adapter_config.json.
        out: the recipe to write; it does not exist yet.
        source: a key of `SOURCES`; None: recognized by the fields.

    Raises:
        UsageError: there is no such file or source, it is not recognized, or `out` exists.
        RecipeError: the file is damaged, or trains something that slimtune does not.
    """
    if out.exists():
        raise UsageError(f"{out} exists", "a file that does not exist yet", "give another --out")
    if source is not None and source not in SOURCES:
        raise UsageError(f"--from {source!r}{suggest(source, SOURCES)}", f"one of {format_names(SOURCES)}")
    read = read_source_file(file)
    format: SourceFormat = SOURCES[source or _recognize(read, file)]
    prepared = format.prepare(read)
    fields, tree = _apply_rules(format, prepared)
    tree.setdefault("output_dir", f"runs/{file.stem}")
    _require_valid(tree, file)
    header = f"# Made by `slimtune import` of {file.name}, a config of {format.NAME}.\n"
    write_atomic(out, header + format_yaml(tree))
    return ImportResult(str(file), format.NAME, str(out), fields, list(prepared.not_in_file))


def _recognize(read: SourceFile, file: Path) -> str:
    """Return the trainer whose marks a file has, or of several the one that knows most fields; else a UsageError."""
    if {"model", "data"} <= read.values.keys() <= {"model", "data", "task", "method", "train", "output_dir"}:
        raise UsageError(f"{file} is a recipe already", "a config of another trainer", f"slimtune plan {file}")
    scores = {
        name: (
            name == read.program,
            len(module.MARKS & read.values.keys()),
            len(module.RULES.keys() & read.values.keys()),
        )
        for name, module in SOURCES.items()
    }
    best = max(scores.values())
    names = [name for name, score in scores.items() if score == best]
    if best[:2] == (False, 0) or len(names) > 1:
        found = format_names(sorted(read.values), 6) or "no field"
        raise UsageError(
            f"{file} is not recognized as the config of a trainer: it has {found}",
            f"a config of {format_names(SOURCES)}",
            "name the trainer: --from llama-factory",
        )
    return names[0]


def _apply_rules(format: SourceFormat, source: SourceFile) -> tuple[list[ImportedField], RecipeTree]:
    """Return what became of each field, and the recipe."""
    tree: RecipeTree = {}
    fields: list[ImportedField] = []
    for path, setting in source.settings.items():
        _set_value(tree, path, setting)
    known: JsonObject = {**source.context, **source.values}
    left_out = {
        name: value(known) if callable(value) else value
        for name, value in format.DEFAULTS.items()
        if source.values.get(name) is None and name not in source.without_defaults
    }
    left_out = {name: value for name, value in left_out.items() if value is not None}
    for is_default, values in ((True, left_out), (False, source.values)):
        for name, value in values.items():
            outcome = _apply_rule(format, name, value, {**left_out, **known})
            for path, setting in outcome.settings.items():
                _set_value(tree, path, setting)
            text = json.dumps(value, ensure_ascii=False, default=str)
            fields.append(
                ImportedField(name, text, outcome.outcome, list(outcome.settings), outcome.reason, is_default)
            )
    order = ("model", "data", "task", "method", "train", "output_dir")
    fields.sort(key=lambda f: f.is_default)
    return fields, {name: tree[name] for name in order if name in tree}


def _apply_rule(format: SourceFormat, name: str, value: Any, values: JsonObject) -> FieldOutcome:
    if name not in format.RULES:
        return FieldOutcome("unknown", reason=suggest(name, format.RULES).removeprefix("; "))
    if value is None or value == "":
        return FieldOutcome("not-needed", reason="it is empty")
    if isinstance(value, str) and "$" in value and (format.NAME, name) != ("mlx-lm", "data"):
        return FieldOutcome("no-equivalent", reason="a variable of the shell: write its value into the recipe")
    try:
        return format.RULES[name](value, values)
    except (TypeError, ValueError):
        raise RecipeError(f"{name} is {value!r}", f"a value that {format.NAME} reads") from None


def _set_value(tree: RecipeTree, path: str, value: Any) -> None:
    section, _, leaf = path.partition(".")
    if not leaf:
        tree[section] = value
    else:
        tree.setdefault(section, {})[leaf] = value


def _require_valid(tree: RecipeTree, file: Path) -> None:
    """Raise RecipeError if a recipe has wrong values, or no base or rows."""
    for path, what in (("model", "base"), ("data", "rows")):
        if path not in tree:
            raise RecipeError(f"{file} names no {what}", f"a config with its {what}")
    Recipe.from_dict(json.loads(json.dumps(tree)), f"the recipe of {file.name}")
