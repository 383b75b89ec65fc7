"""Serving speeds that others published (`published_speeds.csv`, with `published_speed_sources.csv`), which fits are to.

`docs/internals/make_published_speeds.py` writes both tables from benchmarks/data. It imports no torch.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..errors import UsageError, format_names
from ..extras.known_models import load_known_models_by_alias
from .gpu_specs import require_gpu_by_name

SPEEDS_FILE, SOURCES_FILE = "published_speeds.csv", "published_speed_sources.csv"


@dataclass(frozen=True)
class PublishedSpeed:
    """A serving speed that somebody published."""

    gpu: str
    """The GPU or Mac, by the name that plans take."""
    model: str
    """The base, by its short name."""
    engine: str
    """The engine that served it."""
    precision: str
    """Of the weights, by the engine's name."""
    test: str
    """decode: tokens were written; prefill: a prompt was read."""
    tokens: int
    """Behind which tokens were written, or of the prompt."""
    tokens_per_second: float
    """Of one request."""
    source: str
    """Where it was published."""
    date: str
    """When it was published or read, as 2026-11-25."""
    held_out: bool
    """Whether it judges the fits, which have not seen it."""


@dataclass(frozen=True)
class PublishedSpeedsResult:
    """What `benchmarks --json` prints."""

    speeds: list[PublishedSpeed]
    """By GPU and base."""


@cache
def load_published_speeds() -> tuple[PublishedSpeed, ...]:
    """Return every speed, by GPU and base."""
    sources = {row["number"]: row for row in _read_rows(SOURCES_FILE)}
    return tuple(
        PublishedSpeed(
            **{name: row[name] for name in ("gpu", "model", "engine", "precision", "test")},
            tokens=int(row["tokens"]),
            tokens_per_second=float(row["tokens_per_second"]),
            source=sources[row["source"]]["source"],
            date=sources[row["source"]]["date"],
            held_out=sources[row["source"]]["held_out"] == "yes",
        )
        for row in _read_rows(SPEEDS_FILE)
    )


def list_published_speeds(
    gpu: str | None = None, model: str | None = None, engine: str | None = None
) -> list[PublishedSpeed]:
    """Return the speeds of a GPU, a base, an engine, or of all three together.

    Raises:
        UsageError: there is no such GPU, base or engine, or nobody published a speed of it.
    """
    speeds = list(load_published_speeds())
    if gpu is not None:
        name = require_gpu_by_name(gpu).name
        speeds = [s for s in speeds if s.gpu == name]
    if model is not None:
        if model not in load_known_models_by_alias():
            raise UsageError(f"{model!r} is no short name of a base", "a name that slimtune models lists")
        speeds = [s for s in speeds if s.model == model]
    if engine is not None:
        engines = sorted({s.engine for s in load_published_speeds()})
        if engine not in engines:
            raise UsageError(f"{engine!r} is no engine with published speeds", f"one of {format_names(engines)}")
        speeds = [s for s in speeds if s.engine == engine]
    if not speeds:
        raise UsageError("no published speed of these was found", "a GPU and a base that slimtune benchmarks lists")
    return speeds


def _read_rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((files(__package__) / name).read_text(encoding="utf-8").splitlines()))
