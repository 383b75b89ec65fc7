"""A recipe: everything a run is told, as one typed tree, read from YAML, from flags, or from both.

    model ─ data ─ method ─ train ─ output_dir         YAML  ◁─ overridden by ─  flags and `--set train.epochs=1`

The tree is closed (a field nobody knows is a fault) and frozen. All faults are found before any is reported.
`tree.py` holds the fields, `method.py` asks the method for its own, `reading.py` reads, `faults.py` words the faults.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from ..adapters.config import PeftConfig
from ..errors import ConfigError, RecipeError, nearest
from ..methods import config_class
from ..utils.dataset_id import parse_dataset_id
from .aliases import rename_setting, rename_settings
from .errors import FieldError, collect_field_errors, fields_of, format_value, raise_all
from .loading import expand, read_override, read_tree, resolve_paths, set_field, set_path
from .method import known_fields, method_section
from .schema import DataSettings, MethodSettings, ModelSettings, PathLike, Section, TrainSettings, setting

__all__ = ["DataSettings", "MethodSettings", "ModelSettings", "Recipe", "TrainSettings", "load_recipe", "set_path"]


class Recipe(Section):
    """All that a run is told.

    `output_dir` is relative to the working folder; the paths of data and model are made absolute, so that a run is read the
    same from any folder.
    """

    model: ModelSettings
    data: DataSettings
    method: MethodSettings = MethodSettings()
    train: TrainSettings = TrainSettings()
    output_dir: PathLike = setting(
        ..., "the run folder, relative to the working folder; it must not hold another run", "--out"
    )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "the recipe") -> Self:
        """Return the recipe a plain tree describes; `model: x`, `data: x` and `method: x` are short for their sections.

        Args:
            tree: sections and fields, as YAML gives them.
            source: what messages call the tree.

        Raises:
            RecipeError: the tree holds faults; all are named, each with its path, what was got and what is wanted.
        """
        if not isinstance(tree, Mapping):
            raise RecipeError(f"{source} holds {format_value(tree)}", "a mapping with model, data and output_dir")
        tree = rename_settings(expand(copy.deepcopy(dict(tree))), source)
        resolve_paths(tree)
        method, faults = method_section(tree.get("method", {}))
        _set_rate(tree, method["name"])
        everywhere = [path for path, _ in fields_of(cls)] + _method_paths(method["name"])
        try:
            recipe = cls.model_validate({**tree, "method": method})
        except ValidationError as e:
            raise_all(collect_field_errors(e, cls, everywhere) + faults, source)
            raise AssertionError("unreachable") from e
        raise_all([*faults, *recipe._contradictions()], source)
        return recipe

    def method_config(self) -> PeftConfig:
        """Return the method's config: PEFT's fields, with what serves where the recipe says nothing.

        Raises:
            ConfigError: never for a recipe made by `from_dict` or `load_recipe`, which checked it.
        """
        return config_class(self.method.name)(**{"task_type": "CAUSAL_LM", **self.method.settings})

    def to_yaml(self) -> str:
        """Return the resolved recipe, every field written out; `load_recipe` reads it back to an equal recipe."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    def require_files(self) -> None:
        """Look at every data file the recipe names; what can only be a dataset of the Hub is not looked for.

        Raises:
            RecipeError: some are not there; all are named, each with the nearest name in its folder.
        """
        named = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        files = {**named, "chat_template": self.data.chat_template}
        raise_all(
            [
                FieldError(f"data.{name}", f"there is no file {str(path)!r}{nearest(path.name, _beside(path))}")
                for name, path in files.items()
                if path is not None and not path.is_file()
                if name == "chat_template" or not (path.is_dir() or parse_dataset_id(path))
            ],
            "the recipe",
        )

    def _contradictions(self) -> list[FieldError]:
        t, found = self.train, []
        if t.offload_activations and not t.gradient_checkpointing:
            found.append(
                FieldError(
                    "train.offload_activations",
                    "got true, but nothing is checkpointed",
                    "train.gradient_checkpointing true with it",
                )
            )
        if self.method.settings.get("init_lora_weights") == "loftq" and self.model.quantization is None:
            found.append(
                FieldError(
                    "method.init_lora_weights",
                    "got 'loftq', which starts from what quantization lost, and model.quantization is null",
                    "model.quantization nf4 or int8, or another start",
                )
            )
        blind = self.data.validation is None and self.data.validation_fraction == 0
        if t.compile and t.fsdp:
            found.append(
                FieldError("train.compile", "got true, and train.fsdp is true", "one of the two: not tried together")
            )
        return found + [
            FieldError(
                f"train.{name}", f"got {value}, but there are no validation rows", f"data.validation, or {name} null"
            )
            for name in ("early_stopping_patience", "eval_steps")
            if blind and (value := getattr(self.train, name)) is not None
        ]


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read a recipe file and what overrides it.

    Args:
        path: a YAML file; None where the overrides say everything.
        overrides: `{"train.epochs": 1}`, values taken as they are; or `["train.epochs=1"]`, values read as YAML.

    Raises:
        UsageError: there is no such file.
        RecipeError: it is not YAML (line and column are given), or it holds faults (all are named).
    """
    tree = read_tree(Path(path).expanduser()) if path is not None else {}
    given = overrides.items() if isinstance(overrides, Mapping) else [read_override(text) for text in overrides]
    pairs = [rename_setting(where, value) for where, value in given]
    for where, value in pairs:
        if where.startswith("method."):
            _drop_other_spellings(tree, dict(pairs), where.removeprefix("method."))
        set_field(tree, where, value)
    return Recipe.from_dict(tree, str(path) if path is not None else "what the flags say")


def _drop_other_spellings(tree: dict[str, Any], pairs: Mapping[str, Any], name: str) -> None:
    # `--rank 8` overrides a file's `r: 16`; without this the field would be given twice.
    method = tree.get("method")
    if not isinstance(method, dict):
        return
    chosen = pairs.get("method.name", pairs.get("method", method.get("name", "lora")))
    try:
        short = getattr(config_class(chosen), "short_names", {})
    except ConfigError:
        return  # reported with the other faults
    full = short.get(name, name)
    for other in [full, *(s for s, f in short.items() if f == full)]:
        method.pop(other, None)


def _set_rate(tree: dict[str, Any], method: str) -> None:
    """Where the recipe gives no learning rate, take the method's: a learned prompt needs a hundred times a LoRA's."""
    train = tree.setdefault("train", {})
    if isinstance(train, dict):
        with contextlib.suppress(ConfigError):  # an unknown method is among the faults
            train.setdefault("learning_rate", config_class(method).learning_rate)


def _method_paths(name: str) -> list[str]:
    try:
        cls = config_class(name)
    except ConfigError:
        return []
    return [f"method.{n}" for n in (*known_fields(cls), *getattr(cls, "short_names", {}))]


def _beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode's line breaks, which YAML would fold into spaces otherwise."""


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, '"' if set(s) & set("\x85\u2028\u2029") else None)
)
