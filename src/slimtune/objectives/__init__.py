"""The objectives: one file is one objective, and the file's name is what `task` in a recipe says.

    rows of a step ─▶ one forward pass ─▶ −log p of each supervised token ─▶ `Objective.loss`

An objective sees numbers of rows, never a model, so every objective trains with the same packed step, memory recovery,
plan and checkpoints. `base.py` says what an objective is made of.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, format_names, nearest

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from .base import Objective


@cache
def objective_names() -> tuple[str, ...]:
    """Return the names of all objectives, the default first; no objective is imported."""
    names = {f.stem for f in Path(__file__).parent.glob("*.py")} - {"__init__", "base", "sft"}
    return ("sft", *sorted(names))


def require_objective(name: str) -> None:
    """Raise ConfigError with the nearest name if there is no such objective; no objective is imported."""
    known = objective_names()
    if name not in known:
        raise ConfigError(f"there is no task {name!r}{nearest(str(name), known)}", f"one of {format_names(known)}")


def objective_class(name: str) -> "type[Objective]":
    """Return the class of an objective; raise ConfigError with the nearest name if there is none."""
    require_objective(name)
    module = importlib.import_module(f".{name}", __name__)
    return next(c for c in vars(module).values() if getattr(c, "name", None) == name and isinstance(c, type))
