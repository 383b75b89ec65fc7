"""Reads a recipe once, checks all of it, and raises one error that names everything that is wrong.

The checks need no torch, whose import takes seconds; only a method of a third party may import it.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ...errors import RecipeError, SlimtuneError, format_names
from ..adapters.config_fields import (
    FieldError,
    SettingSpec,
    config_field,
    list_settings,
    make_invalid_value_error,
    parse_section_settings,
)
from ..adapters.method_registry import get_method_config_class
from ..foundation.formatting import format_short_value
from ..foundation.remote_code import allow_remote_code
from ..foundation.strict_yaml import format_yaml
from .method_settings import get_full_method_field_names, parse_method_section, parse_task_section
from .objective_registry import load_objective_class
from .recipe_loading import (
    expand_section_shorthand,
    find_missing_data_files,
    make_recipe_paths_absolute,
    parse_overrides,
    read_recipe_tree,
    set_tree_value,
)
from .schema import DataSettings, MethodSettings, ModelSettings, PathLike, RecipeSection, TaskSettings, TrainSettings

MIN_EVAL_ROWS = 6
"""Fewer held-out rows cannot show anything at 95 %: five rows all improve by chance in 1 of 32 cases."""
MOST_ERRORS = 20
"""Errors that a message lists."""
SECTIONS: dict[str, type[RecipeSection]] = {"model": ModelSettings, "data": DataSettings, "train": TrainSettings}
"""The sections whose settings do not depend on a name in them."""
FindMore = Callable[[Mapping[str, Any]], tuple[list[FieldError], SlimtuneError | None]]
"""Returns further errors in a tree, such as missing files, and an exception to raise if there is no other error."""


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
    def from_dict(cls, tree: Mapping[str, Any], source: str = "the recipe", find_more: FindMore | None = None) -> Self:
        """Return the recipe that a plain tree describes; a RecipeError names every error in it by its path.

        Args:
            tree: sections and fields, as YAML has them; `model: x` is short for `model: {name: x}`.
            source: name of the tree in messages.
            find_more: returns further errors in the tree.
        """
        return cls(**parse_recipe_sections(tree, source, find_more=find_more))

    def method_config(self) -> Any:
        """Return the method's config, a `PeftConfig`."""
        return get_method_config_class(self.method.name)(
            **{"task_type": self.objective().task_type, **self.method.settings}
        )

    def objective(self) -> Any:
        """Return the objective, an `Objective`."""
        return self.task.build_objective()

    def resolve_learning_rate(self, rows: int, hidden_size: int) -> Self:
        """Return the recipe with a number for its learning rate.

        Args:
            rows: training rows.
            hidden_size: width of the base's hidden states.
        """
        if self.train.learning_rate != "auto":
            return self
        method, objective = self.method_config(), self.objective()
        rate = method.learning_rate * objective.learning_rate_factor
        # How the best rate depends on the run was measured with the loss of tokens alone.
        if objective.task_type == "CAUSAL_LM" and objective.learning_rate_factor == 1:
            steps = self.train.count_steps(rows)
            epochs = max(1.0, steps * self.train.rows_per_step / max(rows, 1))
            rate = method.default_learning_rate(steps, epochs, hidden_size)
        return replace(self, train=replace(self.train, learning_rate=float(f"{rate:.2g}")))

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every default written out; `load_recipe` reads an equal recipe from it."""
        return format_yaml(self.to_dict())

    def eval_split(self) -> str | None:
        """Return the rows that `slimtune eval` can measure on without a file: "test", else "validation", or None."""
        data = self.data
        if data.test is not None or data.test_fraction > 0:
            return "test"
        return "validation" if data.validation is not None or data.validation_fraction > 0 else None

    def require_files(self) -> None:
        """Require that every data file exists. A path that can only be a dataset of the Hub is not looked up."""
        _raise_errors(find_missing_data_files(self.data.to_dict()), "the recipe")


def load_recipe(
    path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = (), find_more: FindMore | None = None
) -> Recipe:
    """Read a recipe file and apply overrides; without a file the overrides hold everything.

    Overrides are `{"train.epochs": 1}`, whose values are used as they are, or `["train.epochs=1"]`, whose values are
    read as YAML. `find_more` is that of `Recipe.from_dict`.
    """
    settings = parse_overrides(overrides)
    source = str(path) if path is not None else "the flags"
    return Recipe.from_dict(
        replace_recipe_values(read_optional_recipe_tree(path, settings), settings), source, find_more
    )


def load_validated_recipe_tree(
    path: str | Path, overrides: Mapping[str, Any], optional: Collection[str] = (), find_more: FindMore | None = None
) -> dict[str, Any]:
    """Return a recipe file's tree with overrides, after every check; settings in `optional` may be missing in it."""
    tree = replace_recipe_values(read_optional_recipe_tree(path, overrides), overrides)
    parse_recipe_sections(tree, str(path), optional, find_more)
    return expand_section_shorthand(tree)


def build_recipe_sections(settings: Mapping[str, Any], *classes: type[RecipeSection]) -> list[Any]:
    """Return some sections that overrides by dotted path describe; the others may lack required settings."""
    names = [name for name, section in SECTIONS.items() if section in classes]
    optional = [s.path for s in list_settings(Recipe) if s.path.partition(".")[0] not in names]
    sections = parse_recipe_sections(replace_recipe_values({}, settings), "the flags", optional)
    return [next(s for s in sections.values() if isinstance(s, cls)) for cls in classes]


def read_optional_recipe_tree(path: str | Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a recipe file, empty without one; `settings` say whether the base's own code may run."""
    with allow_remote_code(settings.get("model.trust_remote_code") is True):
        return read_recipe_tree(Path(path).expanduser()) if path is not None else {}


def replace_recipe_values(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree with other values at dotted paths; a method setting's other spellings are dropped."""
    changed = copy.deepcopy(dict(tree))
    for where, value in settings.items():
        if where.startswith("method.") and isinstance(changed.get("method"), dict):
            _drop_other_spellings(changed["method"], settings, where.removeprefix("method."))
        set_tree_value(changed, where, value)
    return changed


def _drop_other_spellings(method: dict[str, Any], overrides: Mapping[str, Any], name: str) -> None:
    # `--rank 8` overrides a file's `r: 16`. Without this the field would be given twice.
    names = get_full_method_field_names(
        str(overrides.get("method.name", overrides.get("method", method.get("name", "lora"))))
    )
    full_name = names.get(name, name)
    for spelling in [full_name, *(short for short, full in names.items() if full == full_name)]:
        method.pop(spelling, None)


def parse_recipe_sections(
    tree: Mapping[str, Any], source: str, optional: Collection[str] = (), find_more: FindMore | None = None
) -> dict[str, Any]:
    """Return the arguments of the `Recipe` that a tree describes, without the sections that are incomplete.

    Args:
        tree, source, find_more: as for `Recipe.from_dict`.
        optional: dotted paths of settings that may be missing.

    Raises:
        RecipeError: it names every error in the tree by its path.
    """
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{source} is {format_short_value(tree)}", "a mapping with model, data and output_dir")
    tree = expand_section_shorthand(copy.deepcopy(dict(tree)))
    make_recipe_paths_absolute(tree)
    method, method_errors = parse_method_section(tree.get("method", {}))
    task, task_errors = parse_task_section(tree.get("task", {}))
    every = list_settings(Recipe)
    paths = [s.path for s in every] + [f"method.{name}" for name in get_full_method_field_names(method["name"])]
    sections: dict[str, Any] = {"task": TaskSettings(**task), "method": MethodSettings(**method)}
    errors: list[FieldError] = []
    for name, section in SECTIONS.items():
        given, known = tree.get(name, {}), {s.name: s for s in list_settings(section)}
        if not isinstance(given, Mapping):
            errors.append(FieldError(name, f"got {format_short_value(given)}", f"a section with {format_names(known)}"))
            continue
        values, found = parse_section_settings(known, given, name, paths=paths, most=MOST_ERRORS)
        missing = [s for s in known.values() if s.required and s.name not in given]
        errors += found + [_missing_error(s, f"{name}.{s.name}") for s in missing if f"{name}.{s.name}" not in optional]
        if not found and not missing:
            sections[name] = section(**values)
    output_dir = next(s for s in every if s.path == "output_dir")
    rest = {name: value for name, value in tree.items() if name not in (*SECTIONS, "method", "task")}
    values, found = parse_section_settings({"output_dir": output_dir}, rest, "", names=RECIPE_NAMES, paths=paths)
    if "output_dir" not in rest and "output_dir" not in optional:
        found.insert(0, _missing_error(output_dir, "output_dir"))
    errors += [*found, *method_errors, *task_errors]
    if not errors and set(optional) <= {"output_dir"}:
        errors += find_setting_conflicts(**sections)
    more, alone = find_more(tree) if find_more is not None else ([], None)
    if alone is not None and not errors and len(more) == 1:
        raise alone
    _raise_errors([*errors, *more], source)
    return sections | values


RECIPE_NAMES = ("model", "data", "task", "method", "train", "output_dir")


def _missing_error(spec: SettingSpec, path: str) -> FieldError:
    return FieldError(path, f"missing (flag {spec.flag})", spec.description)


def find_setting_conflicts(
    model: ModelSettings, data: DataSettings, task: TaskSettings, method: MethodSettings, train: TrainSettings
) -> Iterator[FieldError]:
    """Yield the errors that involve settings of several sections, or several settings of one."""
    objective, budget = load_objective_class(task.name), train.forgetting_budget
    if train.offload_activations and not train.gradient_checkpointing:
        message = "got true, but no activations are checkpointed"
        yield FieldError("train.offload_activations", message, "train.gradient_checkpointing true, too")
    if budget is None and data.general_text is not None:
        message = "got a file, which is read for train.forgetting_budget alone, and that is null"
        yield FieldError("data.general_text", message, "train.forgetting_budget, or general_text null")
    if budget is not None and objective.task_type != "CAUSAL_LM":
        more = f", and task is {task.name}, whose model has no loss on text"
        expected = "null, or the task of a language model"
        yield make_invalid_value_error("train.forgetting_budget", budget, expected, more=more)
    elif budget is not None and train.fsdp:
        expected = "only one of the two"
        yield make_invalid_value_error("train.forgetting_budget", budget, expected, more=", and train.fsdp is true")
    if train.compile and train.fsdp:
        yield FieldError("train.compile", "got true, and train.fsdp is true", "only one of the two")
    if method.settings.get("init_lora_weights") == "loftq" and model.quantization is None:
        message = "got 'loftq', which starts from the error of quantization, and model.quantization is null"
        expected = "model.quantization nf4 or int8, or another initialization"
        yield FieldError("method.init_lora_weights", message, expected)
    if data.format is not None and not objective.takes_format(data.format):
        expected = " or ".join((*objective.formats, *objective.named_formats))
        yield make_invalid_value_error("data.format", data.format, expected, more=f", and task is {task.name}")
    if data.test is not None and data.test_fraction > 0:
        more = ", and data.test names rows for `slimtune eval`"
        yield make_invalid_value_error("data.test_fraction", data.test_fraction, "only one of the two", more=more)
    if data.validation is None and data.validation_fraction + data.test_fraction >= 1:
        more = f", and data.validation_fraction is {data.validation_fraction}: no row is left"
        yield make_invalid_value_error("data.test_fraction", data.test_fraction, "less than 1 together", more=more)
    if data.validation is None and data.validation_fraction == 0:
        for name in ("early_stopping_patience", "eval_steps"):
            if (value := getattr(train, name)) is not None:
                expected = f"data.validation, or {name} null"
                yield make_invalid_value_error(
                    f"train.{name}", value, expected, more=", but there are no validation rows"
                )


def _raise_errors(errors: Iterable[FieldError], source: str) -> None:
    """Raise one RecipeError with every error; do nothing if there is none."""
    every = list(errors)
    lines = []
    for e in every[:MOST_ERRORS]:
        expected = "; ".join(filter(None, (e.expected, e.hint)))
        lines.append(f"\n  {e.field[:200]}: {e.problem}" + (f"; expected: {expected}" if expected else ""))
    if lines:
        number = "1 problem" if len(every) == 1 else f"{len(every)} problems"
        lines += [f"\n  … and {len(every) - MOST_ERRORS} more"] if len(every) > MOST_ERRORS else []
        hint = "correct it there, or override it: --set path.to.field=value"
        field = every[0].field if len(every) == 1 else None
        raise RecipeError(f"{source}: {number}:{''.join(lines)}", hint=hint, field=field)
