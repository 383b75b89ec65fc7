"""Base and tuned on the tasks of lm-evaluation-harness (lm-eval): its prompts, its scores, one model in memory.

The harness gets the adapted model as it is; for the base the adapter is switched off around it. Tasks are the harness's
own by name, or YAML files of the user's in a folder, which need no network where their data lie on this machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError, nearest
from ..setup import TrainedModel


def require_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """Return the harness's task manager, knowing every task that is named.

    Raises:
        ModelError: lm-eval is not installed.
        UsageError: there is no such folder, or no such task; the nearest name is given.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelError(
            "--tasks needs the package lm-eval, which is not installed",
            "lm-evaluation-harness beside slimtune",
            "pip install 'slimtune[tasks]'",
        )
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-path {folder} is no folder", "a folder of task YAML files")
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UsageError(
                f"there is no task {name!r}{nearest(name, known)}",
                f"one of the {len(known)} that lm-eval knows, or the `task:` of a YAML file in --tasks-path",
                "list them: lm-eval ls tasks",
            )
    return manager


def run_tasks(loaded: TrainedModel, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Return `{task: {metric: {"base", "base_stderr", "tuned", "tuned_stderr", "higher_is_better"}}}`.

    Args:
        loaded: adapter and base.
        names: tasks or groups, as `require_tasks` knows them.
        manager: what it returned.
        limit: rows of each task at most; None: all.

    Raises:
        ModelError: the harness could not run a task; what it said is given.
    """
    sides = {}
    for who in ("base", "tuned"):
        with _quiet(), loaded.model.disable_adapter() if who == "base" else contextlib.nullcontext():
            sides[who] = _run(loaded, names, manager, limit)
    found: dict[str, Any] = {}
    for task, metrics in sides["tuned"]["results"].items():
        better = sides["tuned"].get("higher_is_better", {}).get(task, {})
        for key, tuned in metrics.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(tuned, int | float):
                continue
            base = sides["base"]["results"][task]
            error = f"{metric}_stderr,{rule}"
            found.setdefault(task, {})[metric if rule == "none" else f"{metric} ({rule})"] = {
                "base": base[key],
                "base_stderr": _number(base.get(error)),
                "tuned": tuned,
                "tuned_stderr": _number(metrics.get(error)),
                "higher_is_better": better.get(metric),
            }
    return found


def _run(loaded: TrainedModel, names: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.base.tokenizer, batch_size=1)
    try:
        return simple_evaluate(
            model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            apply_chat_template=loaded.base.tokenizer.chat_template is not None,
        )
    except Exception as e:  # of a task's own code and data: theirs can be anything
        raise ModelError(
            f"lm-eval could not run {', '.join(names)}: {type(e).__name__}: {e}",
            "tasks whose data lie on this machine, or a network to fetch them",
            "--tasks-path FOLDER with tasks on local data (docs/eval.md)",
        ) from e


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let the harness show its progress, and of its log only errors: it warns of every model that it did not load."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
