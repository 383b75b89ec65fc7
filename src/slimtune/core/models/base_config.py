"""The config of a base, without its weights: of a base on this disk, of the Hub, or as the package knows it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...errors import ModelError, UsageError, format_names, suggest
from ..foundation.json_results import JsonObject
from ..foundation.registry import Registry
from ..foundation.remote_code import remote_code_allowed
from .load_errors import make_remote_code_error, silence_and_translate_load_errors
from .model_source import BASE_READERS, ModelSource, find_known_base, make_unknown_base_error, resolve_model_source

SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
"""Fields that decide a model's size. transformers fills a missing one with the number of another model, silently."""
_CONFIG_HINT = "take config.json from the base's folder, where its weights are"
_LIMITS = dict(
    zip((*SIZE_FIELDS, "max_position_embeddings"), (2**20, 2000, *[2**16] * 2, 2**22, 2**24, 2**63), strict=True)
)
"""Most of each; a config with more is damaged, and the model of its size could not be built even without weights."""

CONFIG_CHECKS: Registry[Any] = Registry("slimtune.config_checks", "check of a config")
"""Modules with `read_base_config_fields` and `make_damaged_field_error_or_none` (extras/damaged_config.py)."""


@dataclass(frozen=True)
class LoadedBaseConfig:
    """A base without weights."""

    name: str  # in reports
    spec: str  # what loads it
    config: PreTrainedConfig
    source: str  # where the config is from


class PreparedBase(NamedTuple):
    """A base that is ready to be loaded."""

    source: ModelSource
    location: str  # the folder or Hub id for `from_pretrained`
    options: dict[str, Any]  # arguments of every `from_pretrained`
    config: PreTrainedConfig
    prepare_seconds: float  # spent on making a folder of another format


def load_config_and_convert_base(
    spec: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreparedBase:
    """Find a base and load its config; of another format, such as GGUF, a folder is made in the cache.

    Raises:
        UsageError: nothing has that name, it has code that is not trusted, or a base on this disk gets a revision.
        ModelError: the base cannot be found, reached or read.
        RunError: the disk or the memory is full.
    """
    source, seconds = resolve_model_source(spec), 0.0
    trust_remote_code |= remote_code_allowed()
    location = source.path
    if revision and source.kind != "hub":
        expected = "a revision only with a Hub id"
        raise UsageError(f"a revision ({revision!r}) was given for {spec!r}, which is on this disk", expected)
    if source.kind in BASE_READERS.names():
        folder, seconds = BASE_READERS.load(source.kind).get_or_make_hf_folder_and_seconds(Path(source.path))
        location = str(folder)
    hub_options = {"revision": revision} if revision else {}
    options = {"trust_remote_code": trust_remote_code, **hub_options}  # without it transformers asks on the terminal
    with silence_and_translate_load_errors(spec):
        raw = CONFIG_CHECKS.load("damage").read_base_config_fields(location, **hub_options)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            raise make_remote_code_error(spec)
        config = _make_valid_config(raw, spec, location, **options)
    return PreparedBase(source, location, options, config, seconds)


def load_convertible_base_config(
    spec: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """Load the config of a base that can be loaded; as `load_config_and_convert_base`."""
    return load_config_and_convert_base(spec, trust_remote_code=trust_remote_code, revision=revision).config


def load_base_config(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> LoadedBaseConfig:
    """Return the config of a base; for a known base nothing is downloaded.

    Args:
        spec: an alias or Hub id of a known base, a config.json, a Hugging Face folder, a GGUF file, or another Hub id.
        trust_remote_code: run the base's own Python code.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: nothing has that name; the nearest is given.
        ModelError: the config cannot be read, or lacks what decides the model's size.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    file = path / "config.json" if os.path.isdir(path) else path
    trust_remote_code |= remote_code_allowed()
    if file.suffix == ".json" and os.path.exists(file):
        return LoadedBaseConfig(file.resolve().parent.name, spec, read_config_file(file, trust_remote_code), str(path))
    if os.path.isfile(path) and (kind := path.suffix.lower().removeprefix(".")) in BASE_READERS.names():
        return LoadedBaseConfig(path.stem, spec, BASE_READERS.load(kind).read_config(path), str(path))
    if (known := find_known_base(spec)) is not None:
        loads = known.alias if known.packaged_weights is not None and "/" not in spec else known.hub_id
        return LoadedBaseConfig(spec.split("/")[-1], loads, AutoConfig.for_model(**known.config), known.source)
    if "/" not in spec:
        raise make_unknown_base_error(spec)
    model = load_config_and_convert_base(spec, trust_remote_code=trust_remote_code, revision=revision)
    return LoadedBaseConfig(model.source.name, spec, model.config, f"config.json of {spec}")


def get_hidden_size(config: PreTrainedConfig) -> int:
    """Return the width of the hidden states; 2048 if the config has no known name for it."""
    text: Any = config.get_text_config()
    names = ("hidden_size", "d_model", "n_embd")
    return next((n for name in names if isinstance(n := getattr(text, name, None), int)), 2048)


def get_max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a base has; None if it names no limit."""
    text: Any = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # MPT and Whisper have their own
    return next((n for name in names if isinstance(n := getattr(text, name, None), int)), None)


def read_config_file(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config in a file; raise ModelError if it is damaged or lacks what decides the model's size."""
    location = str(path.parent if path.name == "config.json" else path)
    with silence_and_translate_load_errors(str(path), "config"):
        raw = CONFIG_CHECKS.load("damage").read_base_config_fields(location)
        kind = str(raw.get("model_type") or "")
        if kind in CONFIG_MAPPING and (missing := _missing_fields(raw, CONFIG_MAPPING[kind])):
            problem = f"{path} lacks {format_names(missing)}"
            raise ModelError(problem, "every field that decides the model's size", _CONFIG_HINT)
        if kind not in CONFIG_MAPPING and "auto_map" in raw and not trust_remote_code:
            raise make_remote_code_error(str(path))
        if kind not in CONFIG_MAPPING and not (kind and trust_remote_code):
            problem = f"the unknown model_type {kind!r}{suggest(kind, CONFIG_MAPPING)}" if kind else "no model_type"
            raise ModelError(f"{path} has {problem}", "the config.json of a known model", _CONFIG_HINT)
        return _make_valid_config(raw, str(path), location, trust_remote_code=trust_remote_code)


def _make_valid_config(fields: JsonObject, spec: str, location: str, **options: Any) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(location, **options)
    except Exception as error:
        raise CONFIG_CHECKS.load("damage").make_damaged_field_error_or_none(fields, spec) or error from error
    _require_valid_config(config, spec)
    return config


def _require_valid_config(config: PreTrainedConfig, spec: str) -> None:
    """Raise ModelError for sizes that no model has, an unknown activation, or a `text_config` that is not a config."""
    try:
        text = config.get_text_config()
        values = {name: getattr(text, name, None) for name in (*_LIMITS, "hidden_act")}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"the config of {spec!r} is damaged: its text_config is no config", hint=_CONFIG_HINT
        ) from error
    activation = values.pop("hidden_act")
    if not isinstance(text, PreTrainedConfig) or (isinstance(activation, str) and activation not in ACT2FN):
        known = f"hidden_act is {activation[:80]!r}{suggest(activation[:80], ACT2FN)}" if activation else "text_config"
        raise ModelError(f"the config of {spec!r} has what transformers does not know: {known}", hint=_CONFIG_HINT)
    for name, value in values.items():
        several = list(value) if isinstance(value, list | tuple) else []  # some have a number for each layer
        for one in several or [value]:
            if one is None or (isinstance(one, int) and (0 if several else 1) <= one <= _LIMITS[name]):
                continue
            raise ModelError(
                f"the config of {spec!r} has {name} = {one!r:.80}",
                f"a number from 1 to {_LIMITS[name]:,}",
                _CONFIG_HINT,
            )


def _missing_fields(raw: dict[str, Any], cls: Any) -> list[str]:
    if "text_config" in raw:  # the text model's own config class fills what is left out on purpose
        return []
    own_names, defaults = getattr(cls, "attribute_map", {}), cls()
    derived = {f for f in SIZE_FIELDS if isinstance(getattr(cls, f, None), property)}
    fields = [f for f in SIZE_FIELDS if f not in derived and isinstance(getattr(defaults, f, None), int)]
    if getattr(defaults, "num_key_value_heads", None) == getattr(defaults, "num_attention_heads", None):
        fields = [f for f in fields if f != "num_key_value_heads"]  # if missing, there are as many as heads
    return [own_names.get(f, f) for f in fields if f not in raw and own_names.get(f, f) not in raw]
