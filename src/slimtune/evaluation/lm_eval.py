"""Run lm-evaluation-harness (lm-eval) tasks on base and tuned model with its prompts and scores; one model in memory.

The harness gets the adapted model; for the base the adapter is disabled around the run. Tasks are the harness's own, by
name, or the user's YAML files in a folder, which need no network if their data is on this machine.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError, nearest
from ..setup import TrainedModel


def find_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """Return the harness's task manager after checking that it knows every named task.

    Raises:
        ModelError: lm-eval is not installed.
        UsageError: the folder or a task does not exist; the nearest name is given.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelError(
            "--tasks needs the package lm-eval, which is not installed",
            "lm-evaluation-harness beside slimtune",
            "pip install 'slimtune[tasks]'",
        )
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-path {folder} is not a folder", "a folder of task YAML files")
    with _errors_only():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UsageError(
                f"there is no task {name!r}{nearest(name, known)}",
                f"one of the {len(known)} tasks of lm-eval, or the `task:` of a YAML file in --tasks-path",
                "list them: lm-eval ls tasks",
            )
    return manager


def run_tasks(trained: TrainedModel, names: Sequence[str], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Return `{task: {metric: {"base", "base_stderr", "tuned", "tuned_stderr", "higher_is_better"}}}`.

    Args:
        trained: adapter and base.
        names: tasks or groups.
        manager: from `find_tasks`.
        limit: most rows of each task; None: all.

    Raises:
        ModelError: the harness could not run a task; its message is included.
    """
    sides = {}
    for who in ("base", "tuned"):
        with _errors_only(), trained.model.disable_adapter() if who == "base" else contextlib.nullcontext():
            sides[who] = _run_harness(trained, names, manager, limit)
    scores: dict[str, Any] = {}
    for task, metrics in sides["tuned"]["results"].items():
        higher_is_better = sides["tuned"].get("higher_is_better", {}).get(task, {})
        for key, tuned in metrics.items():
            metric, _, aggregation = key.partition(",")
            if not aggregation or metric.endswith("_stderr") or not isinstance(tuned, int | float):
                continue
            base = sides["base"]["results"][task]
            error = f"{metric}_stderr,{aggregation}"
            scores.setdefault(task, {})[metric if aggregation == "none" else f"{metric} ({aggregation})"] = {
                "base": base[key],
                "base_stderr": base.get(error) if isinstance(base.get(error), int | float) else None,
                "tuned": tuned,
                "tuned_stderr": metrics.get(error) if isinstance(metrics.get(error), int | float) else None,
                "higher_is_better": higher_is_better.get(metric),
            }
    return scores


def _run_harness(trained: TrainedModel, names: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=trained.model, tokenizer=trained.base.tokenizer, batch_size=1)
    try:
        return simple_evaluate(
            model,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            apply_chat_template=trained.base.tokenizer.chat_template is not None,
        )
    except Exception as e:  # a task's own code and data can raise anything
        raise ModelError(
            f"lm-eval could not run {', '.join(names)}: {type(e).__name__}: {e}",
            "tasks whose data is on this machine, or a network to fetch it",
            "--tasks-path FOLDER with tasks on local data (docs/eval.md)",
        ) from e


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Let only errors of the harness through: it warns about every model that it did not load itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
