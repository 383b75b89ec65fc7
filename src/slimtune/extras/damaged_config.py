"""Whether a config.json can be one, and which of its fields is damaged."""

import copy
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..core.foundation.files import read_json_object
from ..core.foundation.json_results import JsonObject
from ..core.models.load_errors import silencing_model_loading
from ..errors import ModelError

HINT = "take config.json from the base's folder, where its weights are"
MOST_BYTES, MOST_FIELDS, MOST_LEVELS = 8 << 20, 1000, 12
"""Most of a config.json. One with the names of 21,843 classes has 2 MiB, the others have 100 fields in 5 levels.

transformers copies all values several times, and while it checks types it writes the text of every part for each part
around it: 28 nested `text_config` took 1.3 s, and the time grew by n ** 2.5.
"""
_RANGES: tuple[tuple[re.Pattern[str], str, Callable[[float], bool]], ...] = (
    (
        re.compile(r"(drop|dropout)(_prob|_rate|_p)?$"),
        "a probability, at least 0 and at most 1",
        lambda value: 0 <= value <= 1,
    ),
    (re.compile(r"(_eps|_epsilon|^rope_theta)$"), "a finite number above 0", lambda value: 0 < value < math.inf),
)
"""Fields by their names in all families, which transformers takes with any number: the first step would fail by it, or
compute NaN."""


def read_base_config_fields(location: str, **options: Any) -> JsonObject:
    """Return the fields of a config.

    Raises:
        ModelError: it is a pipe, damaged JSON, more than any model has, or a field is out of its range.

    Args:
        location: a folder, a config.json, or a Hub id, whose config is not checked.
        options: of transformers, such as `revision`.
    """
    _require_plausible_config_file(location)
    fields = PreTrainedConfig.get_config_dict(location, **options)[0]
    _require_fields_in_range(fields, location)
    return fields


def _require_fields_in_range(fields: JsonObject, location: str, prefix: str = "") -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            _require_fields_in_range(value, location, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            for pattern, expected, is_in_range in _RANGES:
                if pattern.search(name) and not is_in_range(value):
                    raise ModelError(f"the config of {location!r} has {prefix}{name} = {value!r}", expected, HINT)


def _require_plausible_config_file(location: str) -> None:
    file = Path(location, "config.json") if os.path.isdir(location) else Path(location)
    if not os.path.exists(file):
        return
    if file.stat().st_size > MOST_BYTES:
        raise ModelError(f"{file} has more than {MOST_BYTES >> 20} MiB", "the config of one model", HINT)
    fields = read_json_object(file, ModelError)
    if len(fields) > MOST_FIELDS:
        raise ModelError(f"{file} has {len(fields):,} fields", f"up to {MOST_FIELDS:,}", HINT)
    parts: list[Any] = [fields]
    for _ in range(MOST_LEVELS):
        inner = [v for part in parts for v in (part.values() if isinstance(part, dict) else part)]
        parts = [v for v in inner if isinstance(v, dict | list)]
    if parts:
        raise ModelError(f"{file} is nested more than {MOST_LEVELS} levels deep", "the config of one model", HINT)


def make_damaged_field_error_or_none(values: JsonObject, spec: str) -> ModelError | None:
    """Return the error that names the damaged field of a config and its value; None if it is not one field alone.

    It is the field without which transformers makes the config and builds the model.

    Args:
        values: the fields of a config with which transformers fails.
        spec: name of the base.
    """
    if values.get("model_type") not in tuple(CONFIG_MAPPING.keys()):
        return None
    works = _can_make_config if not _can_make_config(values) else _can_build_model
    for name, value in values.items():
        if name == "model_type" or not works({k: v for k, v in values.items() if k != name}):
            continue
        inner = value if isinstance(value, dict) else {}
        for key in inner:
            if works({**values, name: {k: v for k, v in inner.items() if k != key}}):
                name, value = f"{name}.{key}", inner[key]
                break
        return ModelError(
            f"the config of {spec!r} has {name} = {repr(value)[:80]}",
            f"a value{_describe_type(values['model_type'], name)} that makes a {values['model_type']} model",
            HINT,
        )
    return None


def _describe_type(model_type: str, name: str) -> str:
    field = getattr(CONFIG_MAPPING[model_type], "__dataclass_fields__", {}).get(name)
    return f" of the type {getattr(field.type, '__name__', field.type)}" if field else ""


def _can_make_config(values: JsonObject) -> bool:
    return _make_config(values) is not None


def _can_build_model(values: JsonObject) -> bool:
    config = _make_config(values)
    if config is None:
        return False
    try:
        config.get_text_config().num_hidden_layers = 1  # all layers have the same fields
        with silencing_model_loading(), torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception:  # transformers raises anything
        return False
    return True


def _make_config(values: JsonObject) -> Any:
    try:
        with silencing_model_loading():
            return CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
    except Exception:  # transformers raises anything
        return None
