"""A section of the page: what its template reads, and which command makes what is not there."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Missing(NamedTuple):
    """One thing that is not there."""

    what: str
    command: str


@dataclass(frozen=True)
class Section:
    """One section.

    Args:
        key: its anchor, and the name of its template.
        title: as people read it.
        values: what the template reads; empty: it is left out.
        missing: what is not there.
    """

    key: str
    title: str
    values: dict[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)


def command(verb: str, *arguments: str | Path) -> str:
    """Return the line that calls a verb."""
    return shlex.join(["slimtune", verb, *map(str, arguments)])
