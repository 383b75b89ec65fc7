"""A base's config without its weights: from this disk, or from the facts of popular bases that are shipped.

known.json   alias → Hub ids of that shape, licence, parameters, where the facts are from, the config's fields
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ModelError, UsageError, format_names, nearest
from .errors import translate_load_errors
from .loader import load_config
from .source import ALIASES, resolve_model

SHAPES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
"""Fields that decide a model's size. transformers fills a missing one with a number of another model, silently."""


@dataclass(frozen=True)
class ModelInfo:
    """A base without weights.

    Args:
        name: as reports call it.
        spec: what loads it.
        config: its config.
        source: where the config is from.
    """

    name: str
    spec: str
    config: PreTrainedConfig
    source: str


@cache
def load_known_configs() -> dict[str, dict[str, Any]]:
    """Return the shipped facts by alias."""
    return json.loads((files(__package__) / "known.json").read_text(encoding="utf-8"))


def get_model_info(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> ModelInfo:
    """Return the config that `spec` names; nothing is downloaded for a base whose facts are shipped.

    Args:
        spec: an alias or Hub id of the shipped facts, a config.json, a Hugging Face folder, a GGUF file, or another
            Hub id, of which the config alone is fetched.
        trust_remote_code: run code that the base brings along.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: nothing has that name; the nearest is given.
        ModelError: the config lacks what decides the model's size, or cannot be read.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    if path.suffix == ".json" and path.is_file():
        return ModelInfo(path.resolve().parent.name, spec, _read(path), str(path))
    if path.is_dir() and (path / "config.json").is_file():
        return ModelInfo(path.resolve().name, spec, _read(path / "config.json", trust_remote_code), str(path))
    if path.is_file() and path.suffix.lower() == ".gguf":
        with translate_load_errors(spec):
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        return ModelInfo(path.stem, spec, config, str(path))
    if (alias := _ids().get(spec.lower())) is not None:
        facts = load_known_configs()[alias]
        loads = spec if "/" in spec or alias in ALIASES else facts["hub"][0]
        return ModelInfo(spec.split("/")[-1], loads, AutoConfig.for_model(**facts["config"]), facts["source"])
    if "/" not in spec:
        raise UsageError(
            f"there is no base {spec!r}{nearest(spec.lower(), load_known_configs())}",
            f"one of {format_names(load_known_configs())}, a Hub id, a folder, a GGUF file or a config.json",
        )
    source = resolve_model(spec)
    config = load_config(spec, trust_remote_code=trust_remote_code, revision=revision)
    return ModelInfo(source.name, spec, config, f"config.json of {spec}")


@cache
def _ids() -> dict[str, str]:
    """Return aliases by every name that means them, in lower case."""
    return {name.lower(): alias for alias, facts in load_known_configs().items() for name in (alias, *facts["hub"])}


def _read(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}", "a config.json") from e
    except json.JSONDecodeError as e:
        raise ModelError(f"{path} is not JSON: line {e.lineno}: {e.msg}", "a model's config.json") from e
    kind = str(raw.get("model_type") or "") if isinstance(raw, dict) else ""
    if kind not in CONFIG_MAPPING and not (trust_remote_code and kind):
        what = "has no model_type" if not kind else f"is of the unknown model_type {kind!r}"
        raise ModelError(
            f"{path} {what}{nearest(kind, CONFIG_MAPPING) if kind else ''}",
            "the config.json of a model that transformers knows",
            "take config.json from the base's folder, as it lies beside its weights",
        )
    if kind in CONFIG_MAPPING and (missing := _missing(raw, CONFIG_MAPPING[kind])):
        raise ModelError(
            f"{path} lacks {format_names(missing)}",
            "every field that decides the model's size",
            "take config.json from the base's folder, as it lies beside its weights",
        )
    with translate_load_errors(str(path)):
        return AutoConfig.from_pretrained(str(path.parent if path.name == "config.json" else path),
                                          trust_remote_code=trust_remote_code)  # fmt: skip


def _missing(raw: dict[str, Any], cls: Any) -> list[str]:
    if "text_config" in raw:  # the text model's fields lie there, and those left out are its class's on purpose
        return []
    own, plain = getattr(cls, "attribute_map", {}), cls()
    fields = [f for f in SHAPES if isinstance(getattr(plain, f, None), int)]
    if getattr(plain, "num_key_value_heads", None) == getattr(plain, "num_attention_heads", None):
        fields = [f for f in fields if f != "num_key_value_heads"]  # without it there are as many as heads
    return [own.get(f, f) for f in fields if f not in raw and own.get(f, f) not in raw]
