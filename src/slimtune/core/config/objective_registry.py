"""The registry of objectives: one file in `slimtune/objectives/` is one objective, and the file's name is its name."""

from pathlib import Path
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


def set_objective_paths_absolute_in_place(section: Any, folder: Path | None) -> None:
    """Make the paths in a recipe's section `task` absolute, in place; None: they are relative to the working folder."""
    name = section.get("name") if isinstance(section, dict) else None
    if name in list_objectives():
        load_objective_class(name).set_paths_absolute_in_place(section, Path(folder or ""))
