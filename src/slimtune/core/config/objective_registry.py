"""The registry of objectives: one file in `slimtune/objectives/` is one objective, and the file's name is its name."""

from typing import TYPE_CHECKING, Any

from ..foundation.registry import Registry

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from ..training.objective import Objective

OBJECTIVES: Registry[Any] = Registry("slimtune.objectives", "task")
"""The modules of the objectives, the default first."""


def list_objectives() -> tuple[str, ...]:
    """Return the names of all objectives, the default first; no objective is imported."""
    return OBJECTIVES.names()


def load_objective_class(name: str) -> "type[Objective]":
    """Return the class of an objective; raise ConfigError with the nearest name if there is none."""
    return OBJECTIVES.load_class(name)
