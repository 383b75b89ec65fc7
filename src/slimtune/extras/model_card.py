"""Model cards (README.md) of adapters and merged models, from one template; and configs without local paths."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..core.adapters.method_registry import METHODS
from ..core.adapters.peft_config import PeftConfig
from ..core.foundation.files import write_atomic
from ..core.foundation.formatting import format_bytes, format_count
from ..core.foundation.json_results import JsonObject

CARD_FILE = "README.md"
SAVED_MARKER = "<!-- Written by slimtune with the adapter. Uploading replaces it, unless you delete this line. -->"
_NOT_SETTINGS = ("base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision")


def write_model_card(config: PeftConfig, folder: Path, tags: Sequence[str] = ()) -> None:
    """Write the README.md of a saved adapter, with the tags of its base.

    As PEFT does, a README.md that somebody else wrote keeps its text and gets only the metadata that the Hub needs.
    """
    file = folder / CARD_FILE
    if not file.is_file() or is_slimtune_default_card(file.read_text(encoding="utf-8")):
        write_atomic(file, render_default_card(config, tags))
        return
    try:
        card = ModelCard(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return  # Invalid metadata is the author's to repair.
    for key, value in make_card_data(config, get_public_base_id(config), tags=tags).to_dict().items():
        old = card.data.get(key)
        card.data[key] = [*old, *(t for t in value if t not in old)] if key == "tags" and old else old or value
    card.data["library_name"] = "peft"
    write_atomic(file, str(card))


def render_default_card(config: PeftConfig, tags: Sequence[str] = ()) -> str:
    """Return the short card of a saved adapter, of which nothing but its config is known."""
    base_id = get_public_base_id(config)
    names = {"title": f"{config.name} adapter", "base_name": Path(config.base_model_name_or_path or "").name}
    data = make_card_data(config, base_id, tags=tags)
    return render_model_card(data, config, saved=True, saved_marker=SAVED_MARKER, base_id=base_id, **names)


def is_slimtune_default_card(text: str) -> bool:
    """Return whether a README.md is the one that saving an adapter writes (in earlier releases without a marker)."""
    return SAVED_MARKER in text or ("\n# An adapter (" in text and "# `peft` reads it, too" in text)


def make_card_data(
    config: PeftConfig, base_id: str | None, licence: Mapping[str, Any] | None = None, tags: Sequence[str] = ()
) -> ModelCardData:
    """Return the metadata of an adapter's card.

    `base_id` is None for a base that is not on the Hub, which refuses other names. `licence` holds `license`,
    `license_name` and `license_link` of the base.
    """
    base_tags = [f"base_model:adapter:{base_id}", "transformers"] if base_id else []
    return ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        library_name="peft",
        pipeline_tag="text-generation" if config.task_type == "CAUSAL_LM" else None,
        tags=list(dict.fromkeys([*tags, "slimtune", config.name, *base_tags])),
        **(licence or {}),
    )


def render_model_card(data: ModelCardData, config: PeftConfig, **values: Any) -> str:
    """Return the text of a card; `values` are further variables of `model_card.md.j2`."""
    config_values = strip_local_paths(config.to_dict()).items()
    settings = {k: v for k, v in config_values if k not in _NOT_SETTINGS and v not in (None, [], {})}
    values = {
        "front": data.to_yaml().rstrip(),
        "config": config,
        "settings": json.dumps(settings, indent=2, sort_keys=True, allow_nan=False, default=str),
        "peft_supports": config.name in METHODS.built_in_names() and config.exists_in_peft,
        **values,
    }
    return re.sub(r"\n{3,}", "\n\n", _template().render(values)).lstrip("\n")


def get_public_base_id(config: PeftConfig) -> str | None:
    """Return the base that a config names if it is a Hub id, `org/name`, and not a local folder."""
    name = config.base_model_name_or_path
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def strip_local_paths(values: Mapping[str, Any], base_name: str | None = None) -> JsonObject:
    """Return the values of a JSON config with every local path replaced by its last part.

    `base_name` replaces the name of the base; None: only a path is replaced.
    """
    stripped = {k: _strip_value(k, v) for k, v in values.items()}
    if base := values.get("base_model_name_or_path"):
        stripped["base_model_name_or_path"] = base_name or stripped["base_model_name_or_path"]
        tokenizer = values.get("tokenizer_name_or_path")
        if tokenizer and (tokenizer == base or stripped["tokenizer_name_or_path"] != tokenizer):
            stripped["tokenizer_name_or_path"] = stripped["base_model_name_or_path"]
    return stripped


def _strip_value(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strip_value(k, v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strip_value(key, v) for v in value]
    if not isinstance(value, str) or "\n" in value or len(value) > 1000:
        return value
    looks_local = key.endswith("_or_path") and value.startswith(("/", "~", "./", "../", "\\"))
    is_local = looks_local or ("/" in value and Path(value).expanduser().exists())
    return Path(value).name if is_local else value


def _escape_text(text: Any) -> str:
    """Return text that cannot leave its table cell or start HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


@cache
def _template() -> jinja2.Template:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("slimtune.extras", "."),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "file_name": lambda path: str(path).replace("\\", "/").rpartition("/")[2],
        "quote": json.dumps,
        "text": _escape_text,
        "code": lambda text: f"`{_escape_text(text).replace('`', chr(39))}`",
    }
    return env.get_template("model_card.md.j2")
