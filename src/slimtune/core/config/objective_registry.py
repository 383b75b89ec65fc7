"""The registry of objectives: one file in `slimtune/objectives/` is one objective, and the file's name is its name."""

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, format_names, nearest

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from ..training.objective import Objective

_OBJECTIVES_FOLDER = Path(__file__).parents[2] / "objectives"


@cache
def objective_names() -> tuple[str, ...]:
    """Return the names of all objectives, the default first; no objective is imported."""
    names = {f.stem for f in _OBJECTIVES_FOLDER.glob("*.py")} - {"__init__", "sft"}
    return ("sft", *sorted(names))


def require_objective(name: str) -> None:
    """Raise ConfigError with the nearest name if there is no such objective; no objective is imported."""
    known = objective_names()
    if name not in known:
        raise ConfigError(f"there is no task {name!r}{nearest(str(name), known)}", f"one of {format_names(known)}")


def objective_class(name: str) -> "type[Objective]":
    """Return the class of an objective; raise ConfigError with the nearest name if there is none."""
    require_objective(name)
    module = importlib.import_module(f"slimtune.objectives.{name}")
    return next(c for c in vars(module).values() if getattr(c, "name", None) == name and isinstance(c, type))
