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

from ..utils.files import write_atomic
from ..utils.formatting import format_bytes, format_count
from .config import PeftConfig
from .registry import built_in_methods

CARD_FILE = "README.md"
SAVED_MARKER = "<!-- Written by slimtune with the adapter. Uploading replaces it, unless you delete this line. -->"
NOT_IN_PEFT = frozenset({"bitfit", "bottleneck", "full"})
"""Built-in methods that PEFT does not have."""
_NOT_SETTINGS = frozenset(
    {"base_model_name_or_path", "peft_type", "peft_version", "auto_mapping", "inference_mode", "revision"}
)


def write_model_card(config: PeftConfig, folder: Path) -> None:
    """Write the README.md of a saved adapter.

    As PEFT does, a README.md that somebody else wrote keeps its text and gets only the metadata that the Hub needs.
    """
    file = folder / CARD_FILE
    if file.is_file() and not is_saved_card(text := file.read_text(encoding="utf-8")):
        try:
            card = ModelCard(text)
        except (ValueError, yaml.YAMLError):
            return  # Invalid metadata is the author's to repair.
        for key, value in make_card_data(config, public_base(config)).to_dict().items():
            old = card.data.get(key)
            card.data[key] = [*old, *(t for t in value if t not in old)] if key == "tags" and old else old or value
        card.data["library_name"] = "peft"
        write_atomic(file, str(card))
        return
    write_atomic(file, render_saved_card(config))


def render_saved_card(config: PeftConfig, tags: Sequence[str] = ()) -> str:
    """Return the short card of a saved adapter, of which nothing but its config is known.

    Args:
        config: of the adapter.
        tags: further tags.
    """
    name, base_id = config.base_model_name_or_path, public_base(config)
    return render_card(
        make_card_data(config, base_id, tags=tags),
        config,
        title=f"{config.name} adapter",
        saved=True,
        saved_marker=SAVED_MARKER,
        base_id=base_id,
        base_name=Path(name).name if name else "",
    )


def is_saved_card(text: str) -> bool:
    """Return whether a README.md is the one that saving an adapter writes (in earlier releases without a marker)."""
    return SAVED_MARKER in text or ("\n# An adapter (" in text and "# `peft` reads it, too" in text)


def make_card_data(
    config: PeftConfig, base_id: str | None, licence: Mapping[str, Any] | None = None, tags: Sequence[str] = ()
) -> ModelCardData:
    """Return the metadata of an adapter's card.

    Args:
        config: of the adapter.
        base_id: Hub id of the base; None where it has none: the Hub refuses other names.
        licence: `license`, `license_name` and `license_link` of the base.
        tags: further tags.
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


def render_card(data: ModelCardData, config: PeftConfig, **values: Any) -> str:
    """Return the text of a card.

    Args:
        data: its metadata.
        config: of the adapter.
        values: further variables of `model_card.md.j2`.
    """
    values_of_config = strip_local_paths(config.to_dict()).items()
    settings = {k: v for k, v in values_of_config if k not in _NOT_SETTINGS and v not in (None, [], {})}
    text = (
        _templates()
        .get_template("model_card.md.j2")
        .render(
            {
                "front": data.to_yaml().rstrip(),
                "config": config,
                "settings": json.dumps(settings, indent=2, sort_keys=True, default=str),
                "peft_supports": config.name in built_in_methods() and config.name not in NOT_IN_PEFT,
                **values,
            }
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).lstrip("\n")


def public_base(config: PeftConfig) -> str | None:
    """Return the base that a config names if it is a Hub id, `org/name`, and not a local folder."""
    name = config.base_model_name_or_path
    return name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def strip_local_paths(values: Mapping[str, Any], base_name: str | None = None) -> dict[str, Any]:
    """Return the values of a JSON config with every local path replaced by its last part.

    Args:
        values: of an adapter_config.json or another config.
        base_name: replaces the name of the base; None: only a path is replaced.
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
def _templates() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("slimtune.adapters", "."),
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
    return env
