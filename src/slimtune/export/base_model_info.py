"""Where a base comes from, as others can find it: its id on the Hub and its licence. Neither is guessed.

An alias of ours means nothing elsewhere, and a path is nobody's business: an uploaded adapter names a Hub id or, where
none is known, the base's bare name.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, try_to_load_from_cache

from ..errors import SlimtuneError
from ..models.registry import get_model_info, load_known_configs
from ..models.source import ALIASES, ModelSource, resolve_model
from ..utils.fingerprint import config_fingerprint
from ..utils.hub import require_repo_id

log = logging.getLogger(__name__)

_PLAIN_TYPES = ("F32", "F16", "BF16")
_SECONDS = 10.0
"""How long the Hub may take to show a base's card."""


@dataclass(frozen=True)
class Licence:
    """A licence, as the base's author names it.

    Args:
        name: the Hub's short name, such as "apache-2.0".
        told_by: what says so.
        front: the card's front matter that repeats it: `license`, and for "other" `license_name` and `license_link`.
    """

    name: str
    told_by: str
    front: dict[str, Any]


@dataclass(frozen=True)
class BaseModelInfo:
    """A base, as others can find it.

    Args:
        name: its Hub id, else its bare name; never a path.
        hub_id: its Hub id, where there is one.
        revision: of the base on the Hub, where the run named one.
        licence: None where nothing says it.
        copy: the file of a quantized copy that the run stood on; "" where it stood on the weights themselves.
        notes: what whoever uploads should know.
    """

    name: str
    hub_id: str | None
    revision: str | None = None
    licence: Licence | None = None
    copy: str = ""
    notes: list[str] = field(default_factory=list)


def get_base_model_info(
    spec: str,
    *,
    given: str | None = None,
    fingerprint: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> BaseModelInfo:
    """Return where the base that `spec` names comes from.

    Args:
        spec: what the run or the adapter calls its base.
        given: its Hub id, where the user knows it.
        fingerprint: of the base the adapter was made for.
        revision: of the base on the Hub.
        token: for reading the base's card on the Hub.
        endpoint: of the Hub.

    Raises:
        UsageError: `given` is no Hub id.
    """
    notes: list[str] = []
    source = _source(spec, notes)
    if given is not None:
        require_repo_id(given, owner=True)
    on_hub = source is not None and source.kind == "hub"
    own = source.path if source is not None and on_hub else _of_alias(spec, source, fingerprint)
    hub_id = given or own
    held = _gguf(Path(source.path)) if source and source.kind == "gguf" else _Held()
    licence = held.licence
    if licence is None and source is not None and source.kind == "folder":
        licence = _in_folder(Path(source.path))
    revision = revision if on_hub and hub_id == own else None
    if licence is None and hub_id is not None:
        licence = _on_hub(hub_id, revision, token, endpoint)
    copy = Path(source.path).name if source and held.quantized else ""
    name = hub_id or (source.name if source else Path(spec).name)
    if hub_id is None:
        notes.append(f"no Hub id of the base {name!r} is known here, so that others cannot find it: --base ORG/NAME")
    elif given is None and not on_hub:
        notes.append(f"the base {spec!r} is called {hub_id} in what is uploaded")
    if copy and hub_id is not None:
        notes.append(f"trained on {copy}, a quantized copy: on the weights of {hub_id} answers differ a little")
    if licence is None:
        notes.append(f"nothing here says the licence of {name}: the card calls it unknown")
    return BaseModelInfo(name, hub_id, revision, licence, copy, notes)


def _source(spec: str, notes: list[str]) -> ModelSource | None:
    try:
        return resolve_model(spec)
    except SlimtuneError as e:
        # The adapter is whole without its base; what the base would tell is left out.
        notes.append(f"the base {Path(spec).name!r} is not here: {type(e).__name__}")
        return None


def _of_alias(spec: str, source: ModelSource | None, fingerprint: str | None) -> str | None:
    """Return the Hub id whose name the alias's file begins with: of several of one shape, the one it is."""
    if spec not in ALIASES or spec not in load_known_configs():
        return None
    file = Path(source.path).name if source else ALIASES[spec][1]
    fit = [i for i in load_known_configs()[spec]["hub"] if file.startswith(f"{i.split('/')[1]}.")]
    if not fit or (fingerprint and config_fingerprint(get_model_info(fit[0]).config) != fingerprint):
        return None
    return fit[0]


@dataclass(frozen=True)
class _Held:
    """What a GGUF file says of itself."""

    licence: Licence | None = None
    quantized: bool = False


def _gguf(path: Path) -> _Held:
    try:
        from gguf import GGUFReader  # heavy, optional
    except ImportError:
        return _Held()
    reader = GGUFReader(str(path))
    told = {k: f.contents() for k, f in reader.fields.items() if k.startswith("general.license")}
    front = {
        card: str(told[key])
        for card, key in (
            ("license", "general.license"),
            ("license_name", "general.license.name"),
            ("license_link", "general.license.link"),
        )
        if told.get(key)
    }
    quantized = any(t.tensor_type.name not in _PLAIN_TYPES for t in reader.tensors)
    return _Held(_licence(front, f"the metadata of {path.name}"), quantized)


def _in_folder(folder: Path) -> Licence | None:
    if (found := _of_card(folder / "README.md", "its model card")) is not None:
        return found
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _licence(config, "its config.json") if isinstance(config, dict) else None


def _on_hub(hub_id: str, revision: str | None, token: str | bool | None, endpoint: str | None) -> Licence | None:
    place = try_to_load_from_cache(hub_id, "README.md", revision=revision)
    if isinstance(place, str):
        return _of_card(Path(place), "its model card")
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(hub_id, revision=revision, timeout=_SECONDS)
    except Exception as e:  # gated, offline, gone: what cannot be read says no licence
        log.debug("the card of %s cannot be read: %s", hub_id, type(e).__name__)
        return None
    card = info.card_data
    return _licence(card.to_dict(), "its model card") if card is not None else None


def _of_card(file: Path, told_by: str) -> Licence | None:
    try:
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return _licence(values, told_by) if isinstance(values, dict) else None


def _licence(values: dict[str, Any], told_by: str) -> Licence | None:
    stated = values.get("license")
    if not stated or str(stated).lower() == "unknown":
        return None
    front = {k: values[k] for k in ("license", "license_name", "license_link") if values.get(k)}
    short = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)
    other = short == "other" and front.get("license_name")
    return Licence(str(other or short), told_by, front)
