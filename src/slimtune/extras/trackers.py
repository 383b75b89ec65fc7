"""Trackers of a run, such as TensorBoard and Weights & Biases: accelerate's, as `train.report_to` names them."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from ..core.config import Recipe
from ..core.foundation import distributed
from ..core.training.run_dir import RunDir
from ..errors import UsageError, format_names

PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME", "clearml": "CLEARML_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
}  # fmt: skip
"""The environment variables that name a tracker's project."""


@distributed.raises_on_all_ranks
def require_installed_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if the package of a tracker is not installed; each is named like its package."""
    alternatives = {"tensorboard": ("tensorboard", "tensorboardX")}
    missing = [n for n in names if not any(map(importlib.util.find_spec, alternatives.get(n, (n,))))]
    if missing:
        raise UsageError(
            f"train.report_to names {format_names(missing)}, and the package is not installed",
            "trackers that are installed, or none",
            f"pip install {' '.join(missing)}, or --set train.report_to=[]",
        )


def start_trackers(recipe: Recipe, run: RunDir) -> list[Any]:
    """Start accelerate's trackers for the recipe's `report_to`, in the main process.

    The project is "slimtune", or what `PROJECT_VARIABLES` say. TensorBoard's files go to the run folder, or where
    TENSORBOARD_LOGGING_DIR says.
    """
    trackers: list[Any] = []
    for name in recipe.train.report_to if distributed.is_main_process() else ():
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class("", os.environ.get("TENSORBOARD_LOGGING_DIR", run.tensorboard))
        else:
            tracker = tracker_class(os.environ.get(PROJECT_VARIABLES.get(name, ""), "slimtune"))
        tracker.start()
        tracker.store_init_configuration(_flatten(recipe.to_dict()))
        trackers.append(tracker)
    return trackers


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as `{"train.epochs": 3.0}`, other values than numbers and texts as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
