"""Trackers: transformers' own callbacks log to them; here is what they need, and where TensorBoard's files go."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence

from transformers.integrations import TensorBoardCallback

from ..errors import UsageError, format_names
from ..run_dir import RunDir

_ELSE = {"tensorboard": "tensorboardX"}


def require_trackers(names: Sequence[str]) -> None:
    """Raise UsageError where a tracker is not installed; each has the name of its package."""
    lacking = [n for n in names if not any(importlib.util.find_spec(p) for p in (n, _ELSE.get(n, n)))]
    if lacking:
        raise UsageError(
            f"train.report_to names {format_names(lacking)}, and the package is not installed",
            "trackers that are installed, or none",
            f"pip install {' '.join(lacking)}, or --set train.report_to=[]",
        )


def log_metrics(run: RunDir, callbacks: Iterable[object]) -> None:
    """Let TensorBoard's files lie in the run folder, unless TENSORBOARD_LOGGING_DIR says where."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.tensorboard)
