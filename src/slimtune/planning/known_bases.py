"""The bases that plans know without a download: what `slimtune models` prints. It imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, format_names
from ..extras.known_models import load_known_models_by_alias, read_known_config
from .gpu_specs import format_date_with_age_note


@dataclass(frozen=True)
class KnownBaseFacts:
    """A base with a short name."""

    name: str
    """The short name."""
    family: str
    """Of the base, such as qwen."""
    hub: str
    """Id on the Hub."""
    ollama: list[str]
    """Names in Ollama's library."""
    params: int
    """Numbers of the language part."""
    context: int | None
    """Most tokens of a row; null: not limited."""
    licence: str
    """Its name."""
    gated: bool
    """Whether the Hub wants an account that has accepted the licence."""
    released: str
    """Month in which it came out, as 2025-04."""
    model_type: str
    """The architecture, by transformers' name."""
    source: str
    """Where the facts are from."""
    checked: str
    """When they were last checked, as 2026-11-25."""
    tools: bool
    """Whether its chat template is known to write tools, calls and results."""

    def format_source(self) -> str:
        """Return its ids, and where its facts are from."""
        return (
            f"{', '.join([self.hub, *self.ollama])}: {self.source} (checked {format_date_with_age_note(self.checked)})"
        )


@dataclass(frozen=True)
class KnownBasesResult:
    """What `models --json` prints."""

    models: list[KnownBaseFacts]
    """The bases."""


def list_known_bases(family: str | None = None) -> list[KnownBaseFacts]:
    """Return the bases of a family, or whose name begins so; UsageError if there are none."""
    known = load_known_models_by_alias()
    wanted = (family or "").lower()
    chosen = {name: facts for name, facts in known.items() if facts["family"] == wanted or name.startswith(wanted)}
    if not chosen:
        families = dict.fromkeys(facts["family"] for facts in known.values())
        raise UsageError(f"{family!r} is no family of bases", f"one of {format_names(families, len(families))}")
    return list(_read_facts(chosen))


def _read_facts(chosen: Mapping[str, Mapping[str, Any]]) -> Iterator[KnownBaseFacts]:
    for name, facts in chosen.items():
        config = read_known_config(name, facts["hub"][0])
        text = config.get("text_config", config)
        yield KnownBaseFacts(
            name=name,
            family=facts["family"],
            hub=facts["hub"][0],
            ollama=facts.get("ollama", []),
            params=facts["params"],
            context=text.get("max_position_embeddings") or text.get("n_positions"),
            licence=facts["licence"],
            gated=facts["gated"],
            released=facts["released"],
            model_type=config["model_type"],
            source=facts["source"],
            checked=facts["checked"],
            tools=facts.get("tools", False),
        )
