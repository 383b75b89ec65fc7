"""Reads a recipe once, checks all of it, and raises one error that names everything that is wrong.

The checks need no torch, whose import takes seconds; only a method of a third party may import it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ...errors import RecipeError, format_names
from ..adapters.config_fields import (
    MOST_ERRORS,
    FieldError,
    SettingSpec,
    config_field,
    list_settings,
    make_invalid_value_error,
    map_settings_by_name,
    read_section_and_errors,
)
from ..adapters.method_registry import get_method_config_class
from ..foundation.formatting import format_short_value
from ..foundation.strict_yaml import format_yaml
from .method_settings import map_method_setting_specs_by_name, read_method_or_task_and_errors
from .objective_registry import load_objective_class
from .recipe_loading import (
    expand_section_shorthand,
    parse_override_path_and_value,
    read_recipe_tree,
    set_recipe_paths_absolute_in_place,
)
from .schema import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    PathLike,
    RecipeSection,
    TaskSettings,
    TrainSettings,
)

SECTIONS: dict[str, type[RecipeSection]] = {"model": ModelSettings, "data": DataSettings, "train": TrainSettings}
"""The sections whose settings do not depend on a name in them."""
Check = Callable[[Mapping[str, Any]], list[FieldError]]
"""Returns further errors in a tree, such as missing files."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeSection):
    """All settings of a run.

    `output_dir` is relative to the working folder. The paths of data and model are absolute, so that the run reads the
    same from any folder.
    """

    model: ModelSettings
    data: DataSettings
    task: TaskSettings = field(default_factory=TaskSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    output_dir: PathLike = config_field(
        ..., "run folder, relative to the working folder; it must not hold another run", flag="--out"
    )

    def __post_init__(self) -> None:
        """Do nothing: `from_dict` has checked the sections, and what contradicts in them."""

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "the recipe", extra_checks: Check | None = None) -> Self:
        """Return the recipe that a plain tree describes; a RecipeError names every error in it by its path.

        Args:
            tree: sections and fields, as YAML has them; `model: x` is short for `model: {name: x}`.
            source: name of the tree in messages.
            extra_checks: returns further errors in the tree.
        """
        return cls(**parse_recipe_sections(tree, source, extra_checks=extra_checks))

    def method_config(self) -> Any:
        """Return the method's config, a `PeftConfig`."""
        settings = {"task_type": self.objective().task_type, **self.method.settings}
        return get_method_config_class(self.method.name)(**settings)

    def objective(self) -> Any:
        """Return the objective, an `Objective`."""
        return self.task.build_objective()

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every default written out; `load_recipe` reads an equal recipe from it."""
        return format_yaml(self.to_dict())


def load_recipe(
    path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = (), extra_checks: Check | None = None
) -> Recipe:
    """Read a recipe file and apply overrides; without a file the overrides hold everything.

    Overrides are `{"train.epochs": 1}`, whose values are used as they are, or `["train.epochs=1"]`, whose values are
    read as YAML. `extra_checks` is that of `Recipe.from_dict`.
    """
    settings = overrides if isinstance(overrides, Mapping) else dict(map(parse_override_path_and_value, overrides))
    return Recipe.from_dict(read_recipe_tree(path, settings), str(path or "the flags"), extra_checks)


def parse_recipe_sections(
    tree: Mapping[str, Any], source: str, *, partial: bool = False, extra_checks: Check | None = None
) -> dict[str, Any]:
    """Return the arguments of the `Recipe` that a tree describes, without the sections that are incomplete.

    Args:
        tree, source, extra_checks: as for `Recipe.from_dict`.
        partial: whether required settings may be missing; then conflicts between settings are not looked for.

    Raises:
        RecipeError: it names every error in the tree by its path.
    """
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{source} is {format_short_value(tree)}", "a mapping with model, data and output_dir")
    tree = expand_section_shorthand(copy.deepcopy(dict(tree)))
    set_recipe_paths_absolute_in_place(tree)
    method, method_errors = read_method_or_task_and_errors("method", tree.get("method", {}))
    task, task_errors = read_method_or_task_and_errors("task", tree.get("task", {}))
    every = {s.path: s for s in list_settings(Recipe)}
    paths = [*every, *(f"method.{name}" for name in map_method_setting_specs_by_name(method.name))]
    sections: dict[str, Any] = {"task": task, "method": method}
    errors: list[FieldError] = []
    for name, section in SECTIONS.items():
        given, known = tree.get(name, {}), map_settings_by_name(section)
        if not isinstance(given, Mapping):
            errors.append(FieldError(name, f"got {format_short_value(given)}", f"a section with {format_names(known)}"))
            continue
        values, found = read_section_and_errors(known, given, name, paths)
        missing = [every[f"{name}.{s.name}"] for s in known.values() if s.required and s.name not in given]
        errors += found + [_make_missing_error(s) for s in missing if not partial]
        if not found and not missing:
            sections[name] = section(**values)
    if "output_dir" not in tree and not partial:
        errors.append(_make_missing_error(every["output_dir"]))
    names = dict.fromkeys(f.name for f in fields(Recipe))
    rest = {name: value for name, value in tree.items() if name not in (*SECTIONS, "method", "task")}
    values, found = read_section_and_errors({**names, "output_dir": every["output_dir"]}, rest, "", paths)
    errors += [*found, *method_errors, *task_errors]
    if not task_errors and not partial and SECTIONS.keys() <= sections.keys():
        errors += find_setting_conflicts(**sections)
    _raise_errors([*errors, *(extra_checks(tree) if extra_checks is not None else ())], source)
    return sections | values


def find_setting_conflicts(
    model: ModelSettings, data: DataSettings, task: TaskSettings, method: MethodSettings, train: TrainSettings
) -> Iterator[FieldError]:
    """Yield the errors that involve settings of several sections, or several settings of one."""
    objective, budget = load_objective_class(task.name), train.forgetting_budget
    if train.offload_activations and not train.gradient_checkpointing:
        message = "got true, but no activations are checkpointed"
        yield FieldError("train.offload_activations", message, "train.gradient_checkpointing true, too")
    measurable = objective.task_type == "CAUSAL_LM" and not train.fsdp
    if data.general_text is not None and (budget is None or not measurable):
        expected = "null, as forgetting is not measured: it is read for train.forgetting_budget alone"
        yield make_invalid_value_error("data.general_text", str(data.general_text), expected)
    if budget not in (None, "auto") and not measurable:
        more = ", and train.fsdp is true" if train.fsdp else f", and {task.name} has no loss on text"
        yield make_invalid_value_error("train.forgetting_budget", budget, "auto or null", suffix=more)
    if train.compile and train.fsdp:
        yield FieldError("train.compile", "got true, and train.fsdp is true", "only one of the two")
    if method.settings.get("init_lora_weights") == "loftq" and model.quantization is None:
        message = "got 'loftq', which starts from the error of quantization, and model.quantization is null"
        expected = "model.quantization nf4 or int8, or another initialization"
        yield FieldError("method.init_lora_weights", message, expected)
    if data.format is not None and not objective.takes_format(data.format):
        expected = " or ".join((*objective.formats, *objective.named_formats))
        yield make_invalid_value_error("data.format", data.format, expected, suffix=f", and task is {task.name}")
    if data.test is not None and data.test_fraction > 0:
        more = ", and data.test names rows for `slimtune eval`"
        yield make_invalid_value_error("data.test_fraction", data.test_fraction, "only one of the two", suffix=more)
    if data.validation is None and data.validation_fraction + data.test_fraction >= 1:
        more = f", and data.validation_fraction is {data.validation_fraction}: no row is left"
        yield make_invalid_value_error("data.test_fraction", data.test_fraction, "less than 1 together", suffix=more)
    if data.validation is None and data.validation_fraction == 0:
        for name in ("early_stopping_patience", "eval_steps"):
            if (value := getattr(train, name)) is not None:
                more = ", but there are no validation rows"
                yield make_invalid_value_error(f"train.{name}", value, f"data.validation, or {name} null", suffix=more)


def _make_missing_error(setting: SettingSpec) -> FieldError:
    return FieldError(setting.path, f"missing (flag {setting.flag})", setting.description)


def _raise_errors(errors: Sequence[FieldError], source: str) -> None:
    """Raise one RecipeError with every error, or the cause of the only one; do nothing if there is none."""
    if not errors:
        return
    if len(errors) == 1 and errors[0].cause is not None:
        raise errors[0].cause
    number = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    lines = [f"{source}: {number}:"]
    for e in errors[:MOST_ERRORS]:
        expected = "; ".join(filter(None, (e.expected, e.hint)))
        lines.append(f"  {e.field[:200]}: {e.problem}" + (f"; expected: {expected}" if expected else ""))
    lines += [f"  … and {len(errors) - MOST_ERRORS} more"] if len(errors) > MOST_ERRORS else []
    hint = "correct it there, or override it: --set path.to.field=value"
    raise RecipeError("\n".join(lines), hint=hint, field=errors[0].field if len(errors) == 1 else None)
