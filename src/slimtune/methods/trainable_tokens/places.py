"""The modules in which rows train: the embeddings that are named, and what is tied to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from ...adapters.base import SiteKind
from ...adapters.targets import matches_name
from ...errors import TargetError, nearest
from ...utils.linear_layers import get_weight, layer_kind


class Place(NamedTuple):
    """One module in which rows train.

    Args:
        kind: "embedding" or "linear".
        rows: the numbers of the rows.
        owner: name of the module it is tied to, whose rows it shares; None: it has its own.
        told: whether a file holds the shared rows under this name, too (PEFT's method does, its LoRA does not).
    """

    kind: SiteKind
    rows: list[int]
    owner: str | None
    told: bool


def places(
    model: nn.Module, tokens: list[int] | Mapping[str, list[int]], whole: Collection[str], *, told_twice: bool
) -> dict[str, Place]:
    """Return the modules in which rows train, by full name; owners stand before what is tied to them.

    Args:
        model: the model.
        tokens: numbers of tokens in the input embedding; or name, or ending, of an embedding → numbers.
        whole: names of the modules trained whole, which cannot be meant, too.
        told_twice: see `Place.told`.

    Raises:
        TargetError: a name matches nothing, or is trained whole, or a number is no row.
    """
    if not isinstance(tokens, Mapping):
        tokens = {input_embedding(model): tokens}
    modules: dict[str, Any] = {n: m for n, m in model.named_modules() if layer_kind(m) in ("embedding", "linear")}
    chosen: dict[str, list[int]] = {}
    for key, rows in tokens.items():
        found = [n for n in modules if matches_name([key], n)]
        if not found:
            raise TargetError(
                f"trainable_token_indices: {key!r} matches no embedding{nearest(key, modules)}",
                "the name of an embedding",
                "for the input embedding give a plain list of numbers",
            )
        chosen |= dict.fromkeys(found, rows)
    for name, rows in chosen.items():
        if any(name.endswith(w) for w in whole):
            raise TargetError(
                f"{name} is trained whole by modules_to_save and by its tokens, too",
                "either in modules_to_save or by its tokens",
                "take it out of one",
            )
        size = get_weight(modules[name]).shape[1 if layer_kind(modules[name]) == "embedding" else 0]
        if max(rows) >= size:
            raise TargetError(f"trainable tokens: {name} has no row {max(rows)}", f"numbers below {size}")
    owners: dict[int, str] = {}
    for name in sorted(chosen, key=lambda n: layer_kind(modules[n]) != "embedding"):
        owners.setdefault(id(modules[name]._parameters["weight"]), name)
    found_places = {}
    for name, module in modules.items():
        owner = owners.get(id(module._parameters["weight"]))
        rows = chosen.get(name) or (chosen[owner] if owner else [])
        tied = owner is not None and owner != name and rows == chosen[owner]
        if rows:
            found_places[name] = Place(layer_kind(module), rows, owner if tied else None, told_twice)  # type: ignore[arg-type]
    return dict(sorted(found_places.items(), key=lambda item: item[1].owner is not None))


def input_embedding(model: Any) -> str:
    """Return the full name of the model's input embedding; PEFT's guess where the model does not tell."""
    wanted = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((n for n, m in model.named_modules() if m is wanted), "embed_tokens")


def row_numbers(rows: Any) -> bool:
    """Return whether `rows` is a list of row numbers, each once."""
    right = isinstance(rows, list) and bool(rows) and len(set(rows)) == len(rows)
    return right and all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in rows)
