"""The registry of objectives: one file in `slimtune/objectives/` is one objective, and the file's name is its name."""

from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, format_names, nearest
from ..foundation.registry import Registry

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from ..training.objective import Objective

OBJECTIVES: Registry[Any] = Registry("slimtune.objectives", "task")
"""The modules of the objectives."""


@cache
def list_objectives() -> tuple[str, ...]:
    """Return the names of all objectives, the default first; no objective is imported."""
    return tuple(sorted(OBJECTIVES.names(), key=lambda name: (name != "sft", name)))


def _require_objective(name: str) -> None:
    """Raise ConfigError with the nearest name if there is no such objective; no objective is imported."""
    known = list_objectives()
    if name not in known:
        raise ConfigError(f"there is no task {name!r}{nearest(str(name), known)}", f"one of {format_names(known)}")


def load_objective_class(name: str) -> "type[Objective]":
    """Return the class of an objective; raise ConfigError with the nearest name if there is none."""
    _require_objective(name)
    module = OBJECTIVES.load(name)
    return next(c for c in vars(module).values() if getattr(c, "name", None) == name and isinstance(c, type))
