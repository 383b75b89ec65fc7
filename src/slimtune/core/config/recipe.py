"""Reads a recipe and checks it: all errors that show without torch are found before any is reported.

Only then is the method imported, which takes seconds and finds settings that contradict each other.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError

from ...errors import ConfigError, RecipeError, nearest
from ..adapters.method_registry import config_class, require_method
from ..foundation.files import parse_dataset_id
from ..foundation.remote_code import allow_remote_code
from .aliases import rename_setting, rename_settings
from .field_errors import FieldError, collect_field_errors, format_value, raise_errors
from .method_settings import find_setting_errors, read_names, resolve_method, resolve_task
from .objective_registry import objective_class, require_objective
from .recipe_loading import (
    DATA_FILES,
    expand_short_sections,
    parse_override,
    read_recipe_tree,
    resolve_paths,
    set_field,
)
from .schema import (
    DataSettings,
    MethodSettings,
    ModelSettings,
    PathLike,
    Section,
    TaskSettings,
    TrainSettings,
    iterate_settings,
    setting,
)

MIN_EVAL_ROWS = 6
"""Fewer held-out rows cannot show anything at 95 %: five rows all improve by chance in 1 of 32 cases."""


class Recipe(Section):
    """All settings of a run.

    `output_dir` is relative to the working folder. The paths of data and model are absolute, so that the run reads the
    same from any folder.
    """

    model: ModelSettings
    data: DataSettings
    task: TaskSettings = TaskSettings()
    method: MethodSettings = MethodSettings()
    train: TrainSettings = TrainSettings()
    output_dir: PathLike = setting(
        ..., "run folder, relative to the working folder; it must not hold another run", flag="--out"
    )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "the recipe") -> Self:
        """Return the recipe that a plain tree describes; a RecipeError names every error in it by its path.

        Args:
            tree: sections and fields, as YAML has them; `model: x` is short for `model: {name: x}`.
            source: name of the tree in messages.
        """
        if not isinstance(tree, Mapping):
            raise RecipeError(f"{source} is {format_value(tree)}", "a mapping with model, data and output_dir")
        tree = rename_settings(expand_short_sections(copy.deepcopy(dict(tree))), source)
        resolve_paths(tree)
        section = tree.get("method", {})
        errors = find_errors(tree)
        if errors and not tree.get("task", {}).keys() - {"name"}:  # there is nothing in the task to import it for
            raise_errors(errors, source)
        method, method_errors = resolve_method(section)
        task, task_errors = resolve_task(tree.get("task", {}))
        raise_errors({e.path: e for e in (*errors, *method_errors, *task_errors)}.values(), source)
        recipe = cls.model_validate({**tree, "task": task, "method": method})
        raise_errors(recipe._find_contradictions(), source)
        return recipe

    def method_config(self) -> Any:
        """Return the method's config, a `PeftConfig`."""
        return config_class(self.method.name)(**{"task_type": self.objective().task_type, **self.method.settings})

    def objective(self) -> Any:
        """Return the objective, an `Objective`."""
        return objective_class(self.task.name)(**self.task.settings)

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
        return self.model_copy(update={"train": self.train.model_copy(update={"learning_rate": float(f"{rate:.2g}")})})

    def to_yaml(self) -> str:
        """Return the recipe as YAML, with every default written out; `load_recipe` reads an equal recipe from it."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    def eval_split(self) -> str | None:
        """Return the rows that `slimtune eval` can measure on without a file: "test", else "validation", or None."""
        data = self.data
        if data.test is not None or data.test_fraction > 0:
            return "test"
        return "validation" if data.validation is not None or data.validation_fraction > 0 else None

    def require_files(self) -> None:
        """Require that every data file exists. A path that can only be a dataset of the Hub is not looked up."""
        raise_errors(find_missing_files(dict(self.data)), "the recipe")

    def _find_contradictions(self) -> list[FieldError]:
        """Return the errors that involve several settings."""
        t, errors = self.train, []
        if t.offload_activations and not t.gradient_checkpointing:
            message = "got true, but no activations are checkpointed"
            errors.append(FieldError("train.offload_activations", message, "train.gradient_checkpointing true, too"))
        if t.forgetting_budget is None and self.data.general_text is not None:
            message = "got a file, which is read for train.forgetting_budget alone, and that is null"
            errors.append(FieldError("data.general_text", message, "train.forgetting_budget, or general_text null"))
        if t.forgetting_budget is not None:
            message = f"got {t.forgetting_budget}"
            if self.objective().task_type != "CAUSAL_LM":
                message += f", and task is {self.task.name}, whose model has no loss on text"
                errors.append(FieldError("train.forgetting_budget", message, "null, or the task of a language model"))
            if t.fsdp:
                message += ", and train.fsdp is true"
                errors.append(FieldError("train.forgetting_budget", message, "only one of the two"))
        if t.compile and t.fsdp:
            errors.append(FieldError("train.compile", "got true, and train.fsdp is true", "only one of the two"))
        if self.method.settings.get("init_lora_weights") == "loftq" and self.model.quantization is None:
            message = "got 'loftq', which starts from the error of quantization, and model.quantization is null"
            expected = "model.quantization nf4 or int8, or another initialization"
            errors.append(FieldError("method.init_lora_weights", message, expected))
        d = self.data
        task = objective_class(self.task.name)
        formats = (*task.formats, *task.named_formats)
        if d.format is not None and d.format not in formats:
            errors.append(
                FieldError("data.format", f"got {d.format!r}, and task is {self.task.name}", " or ".join(formats))
            )
        if d.test is not None and d.test_fraction > 0:
            message = f"got {d.test_fraction}, and data.test names rows for `slimtune eval`"
            errors.append(FieldError("data.test_fraction", message, "only one of the two"))
        if d.validation is None and d.validation_fraction + d.test_fraction >= 1:
            message = f"got {d.test_fraction}, and data.validation_fraction is {d.validation_fraction}: no row is left"
            errors.append(FieldError("data.test_fraction", message, "less than 1 together"))
        if self.data.validation is None and self.data.validation_fraction == 0:
            for name in ("early_stopping_patience", "eval_steps"):
                if (value := getattr(t, name)) is not None:
                    message = f"got {value}, but there are no validation rows"
                    errors.append(FieldError(f"train.{name}", message, f"data.validation, or {name} null"))
        return errors


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides; without a file the overrides hold everything.

    Overrides are `{"train.epochs": 1}`, whose values are used as they are, or `["train.epochs=1"]`, whose values are
    read as YAML.
    """
    given = overrides.items() if isinstance(overrides, Mapping) else [parse_override(text) for text in overrides]
    settings = dict(rename_setting(where, value) for where, value in given)
    with allow_remote_code(settings.get("model.trust_remote_code") is True):
        tree = read_recipe_tree(Path(path).expanduser()) if path is not None else {}
    return Recipe.from_dict(apply_settings(tree, settings), str(path) if path is not None else "the flags")


def apply_settings(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tree with other values at dotted paths; a method setting's other spellings are dropped."""
    changed = copy.deepcopy(dict(tree))
    for where, value in settings.items():
        if where.startswith("method.") and isinstance(changed.get("method"), dict):
            _drop_other_spellings(changed["method"], settings, where.removeprefix("method."))
        set_field(changed, where, value)
    return changed


def find_errors(tree: Mapping[str, Any]) -> list[FieldError]:
    """Return the errors in a tree, with sections in long form, that show without an import of torch.

    Left out are settings of the method that contradict each other, and the settings of the task.
    """
    section, task = tree.get("method") or {}, tree.get("task") or {}
    errors: list[FieldError] = []
    try:
        Recipe.model_validate({**tree, "method": {}, "task": {}})
    except ValidationError as e:
        names = read_names(str(section.get("name", "lora"))) or ("rank", "alpha")
        paths = [s.path for s in iterate_settings(Recipe)] + [f"method.{name}" for name in names]
        errors = collect_field_errors(e, Recipe, paths)
    try:
        require_method(section.get("name", "lora"))
        errors += find_setting_errors(section)
    except ConfigError as e:
        errors.append(FieldError("method.name", e.message, e.expected))
    try:
        require_objective(task.get("name", "sft"))
    except ConfigError as e:
        errors.append(FieldError("task.name", e.message, e.expected))
    return errors


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


def _drop_other_spellings(method: dict[str, Any], overrides: Mapping[str, Any], name: str) -> None:
    # `--rank 8` overrides a file's `r: 16`. Without this the field would be given twice.
    method_name = overrides.get("method.name", overrides.get("method", method.get("name", "lora")))
    names = read_names(str(method_name))
    full_name = names.get(name, name)
    for spelling in [full_name, *(short for short, full in names.items() if full == full_name)]:
        method.pop(spelling, None)


class _Dumper(yaml.SafeDumper):
    """Quotes text that contains Unicode's line breaks, which YAML would otherwise fold into spaces."""


_Dumper.add_representer(
    str, lambda d, s: d.represent_scalar("tag:yaml.org,2002:str", s, '"' if set(s) & set("\x85\u2028\u2029") else None)
)
