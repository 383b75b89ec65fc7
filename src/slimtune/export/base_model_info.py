"""The base of an adapter as others can find it: its Hub id and its licence. Neither is guessed.

An alias has no meaning on another machine, and a path is private: an uploaded adapter names a Hub id or, where none is
known, the base's bare name.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from ..core.foundation.files import read_json_object
from ..core.foundation.fingerprint import config_fingerprint
from ..core.models.base_config import load_base_config
from ..core.models.model_source import ModelSource, resolve_model_source
from ..errors import RunError, SlimtuneError
from ..extras.hub_commits import require_repo_id
from ..extras.known_models import PACKAGED, load_known_models_by_alias

log = logging.getLogger(__name__)

UNQUANTIZED = ("F32", "F16", "BF16")
TIMEOUT = 10.0
"""Seconds until the Hub must have sent the base's card."""


@dataclass(frozen=True)
class Licence:
    """A licence, as the base's author names it."""

    name: str  # its short name on the Hub, such as "apache-2.0"
    source: str  # what names it
    metadata: dict[str, Any]  # `license` and, for "other", `license_name` and `license_link`, for the card


@dataclass(frozen=True)
class BaseModelInfo:
    """A base as others can find it; what is unknown is None."""

    name: str  # its Hub id, else its bare name; never a path
    hub_id: str | None
    revision: str | None = None
    licence: Licence | None = None
    quantized_file: str = ""  # that the run trained on; "" where it used the weights themselves
    notes: list[str] = field(default_factory=list)  # what the user should know before uploading


def fetch_base_model_info(
    spec: str,
    *,
    given_hub_id: str | None = None,
    trained_fingerprint: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> BaseModelInfo:
    """Return the Hub id and licence of the base that a run or an adapter names.

    `given_hub_id` is what the user gives; `trained_fingerprint` that of the base that the adapter was trained on.
    """
    notes: list[str] = []
    source: ModelSource | None = None
    try:
        source = resolve_model_source(spec)
    except SlimtuneError as e:
        # The adapter is complete without its base; only what the base would say is missing.
        notes.append(f"the base {Path(spec).name!r} cannot be loaded here: {type(e).__name__}")
    if given_hub_id is not None:
        require_repo_id(given_hub_id, require_owner=True)
    on_hub = source is not None and source.kind == "hub"
    own_id = source.path if source is not None and on_hub else _find_hub_id_of_alias(spec, source, trained_fingerprint)
    hub_id = given_hub_id or own_id
    revision = revision if on_hub and hub_id == own_id else None

    licence, quantized_file = None, ""
    if source is not None and source.kind == "gguf":
        licence, quantized_file = _read_gguf(Path(source.path))
    elif source is not None and source.kind == "folder":
        licence = _read_card_licence(Path(source.path, "README.md"))
        try:
            licence = licence or _make_licence(read_json_object(Path(source.path, "config.json")), "its config.json")
        except RunError as e:
            log.debug("%s", e)
    if licence is None and hub_id is not None:
        licence = _fetch_licence(hub_id, revision, token)

    name = hub_id or (source.name if source else Path(spec).name)
    if hub_id is None:
        notes.append(f"the Hub id of the base {name!r} is unknown, so others cannot find it: give --base ORG/NAME")
    elif given_hub_id is None and not on_hub:
        notes.append(f"the upload names the base {hub_id} in place of {spec!r}")
    if quantized_file and hub_id is not None:
        effect = f"with the weights of {hub_id} answers differ a little"
        notes.append(f"trained on {quantized_file}, a quantized copy: {effect}")
    if licence is None:
        notes.append(f"the licence of {name} is unknown, and the card says so")
    return BaseModelInfo(name, hub_id, revision, licence, quantized_file, notes)


def _find_hub_id_of_alias(spec: str, source: ModelSource | None, fingerprint: str | None) -> str | None:
    """Return the Hub id whose name begins the alias's file name, if its config has the fingerprint."""
    configs = load_known_models_by_alias()
    if spec not in PACKAGED or spec not in configs:
        return None
    file = Path(source.path).name if source else PACKAGED[spec].file
    hub_id = next((i for i in configs[spec]["hub"] if file.startswith(f"{i.split('/')[1]}.")), None)
    if hub_id and fingerprint and config_fingerprint(load_base_config(hub_id).config) != fingerprint:
        return None
    return hub_id


def _read_gguf(path: Path) -> tuple[Licence | None, str]:
    """Return the licence in a GGUF file's metadata, and the file's name if its weights are quantized."""
    try:
        from gguf import GGUFReader  # heavy, optional
    except ImportError:
        return None, ""
    reader = GGUFReader(str(path))
    fields = {name: reader.fields.get(f"general.{name}") for name in ("license", "license.name", "license.link")}
    metadata = {name.replace(".", "_"): str(f.contents()) for name, f in fields.items() if f is not None}
    is_quantized = any(t.tensor_type.name not in UNQUANTIZED for t in reader.tensors)
    return _make_licence(metadata, f"the metadata of {path.name}"), path.name if is_quantized else ""


def _fetch_licence(hub_id: str, revision: str | None, token: str | bool | None) -> Licence | None:
    """Return the licence in the base's model card, from the cache or the Hub."""
    cached = try_to_load_from_cache(hub_id, "README.md", revision=revision)
    if isinstance(cached, str):
        return _read_card_licence(Path(cached))
    try:
        info = HfApi(token=token).model_info(hub_id, revision=revision, timeout=TIMEOUT)
    except Exception as e:  # gated, offline or deleted: then the licence is unknown
        log.debug("the card of %s cannot be read: %s", hub_id, type(e).__name__)
        return None
    return _make_licence(info.card_data.to_dict(), "its model card") if info.card_data is not None else None


def _read_card_licence(file: Path) -> Licence | None:
    try:
        return _make_licence(ModelCard.load(file, ignore_metadata_errors=True).data.to_dict(), "its model card")
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _make_licence(metadata: dict[str, Any], source: str) -> Licence | None:
    stated = metadata.get("license")
    if not stated or str(stated).lower() == "unknown":
        return None
    kept = {k: metadata[k] for k in ("license", "license_name", "license_link") if metadata.get(k)}
    name = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    if name == "other" and kept.get("license_name"):
        name = str(kept["license_name"])
    return Licence(name, source, kept)
