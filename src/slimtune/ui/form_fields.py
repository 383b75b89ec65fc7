"""The fields of the forms: settings of the recipe, with help, limits and defaults of its schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.adapters.config_fields import SettingSpec, list_settings
from ..core.adapters.method_registry import list_methods
from ..core.config import Recipe
from ..core.foundation.strict_yaml import parse_yaml
from ..core.foundation.type_hints import describe_type_hint
from ..errors import SlimtuneError
from .field_help import AUTOMATIC, NULL_MEANS, hint_at_decimal_comma

SETTINGS = {s.path: s for s in list_settings(Recipe)}
BASE, ROWS, MORE = "model.name", "data.train", "more"
ROWS_FIELDS = {
    "data.format": "Format",
    "data.train_on": "Learned turns",
    "data.max_seq_len": "Longest row",
    "data.on_overlong": "Longer rows",
}
"""Label of each setting of the first page that changes how rows are read, beside the columns."""
RUN_FIELDS = {
    "task.name": "Objective",
    "method.name": "Method",
    "train.epochs": "Epochs",
    "train.max_steps": "Steps",
    "train.batch_size": "Batch size",
    "train.learning_rate": "Learning rate",
    "data.validation_fraction": "Validation share",
    "data.test_fraction": "Test share",
    "model.quantization": "Quantization",
}
"""Label of each setting that changes the run and has a field of its own: the objective on the first page, the others on
the second, whose last field, `more`, takes all others."""


class FormField(NamedTuple):
    """One field of a form."""

    setting: SettingSpec
    label: str
    options: Sequence[str]  # to choose from; empty: a text or a number
    is_number: bool
    default: str  # what an empty field means
    value: str  # what was chosen; empty: the default
    error: str  # what is wrong with the value; empty: nothing


def make_form_fields(
    labels_by_setting: Mapping[str, str], choices: Mapping[str, str], learning_rate: float | None = None
) -> list[FormField]:
    """Return the fields of settings with these labels.

    Args:
        labels_by_setting: the label of each setting.
        choices: what was chosen, by setting.
        learning_rate: what "auto" is for the run that was planned last; None: not known.
    """
    fields = []
    for path, label in labels_by_setting.items():
        setting, value = SETTINGS[path], choices.get(path, "")
        is_number, names = not {int, float}.isdisjoint(setting.kinds), {"method.name": list_methods()}
        options = () if is_number else names.get(path, setting.list_choices())
        default = _describe_default(setting, learning_rate if path == "train.learning_rate" else None)
        fields.append(FormField(setting, label, options, is_number, default, value, find_value_error(path, value)))
    return fields


def _describe_default(setting: SettingSpec, automatic: float | None) -> str:
    """Return what an empty field means: a value, or what null means; `automatic` is what "auto" is."""
    if setting.default == "auto":
        return AUTOMATIC if automatic is None else f"{AUTOMATIC} ({automatic:g})"
    if setting.default is None:
        return NULL_MEANS.get(setting.path) or setting.when_null or "not set"
    return f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)


def find_value_error(path: str, text: str) -> str:
    """Return what is wrong with a value as a person typed it, by the recipe's own checks; empty: nothing."""
    if text.strip().lower() in ("", AUTOMATIC) or (setting := SETTINGS.get(path)) is None:
        return ""
    try:
        value = text if set(setting.kinds) & {str, Path} else parse_yaml(text, path)
    except SlimtuneError as e:
        return e.message
    said = f"It takes {_describe_values(setting)}{hint_at_decimal_comma(text)}."
    return said if setting.find_error(setting.read(value)) else ""


def _describe_values(setting: SettingSpec) -> str:
    """Return what a person may type: without null and "auto", which an empty field means, and limits nobody reaches."""
    numbers = [kind for kind in setting.kinds if kind in (int, float)]
    kinds = numbers or [kind for kind in setting.kinds if kind is not type(None)]
    words = " or ".join(describe_type_hint(kind, True, setting.list_choices()) for kind in kinds)
    return setting.takes or ", ".join(filter(None, (words, setting.limits)))
