"""Run lm-evaluation-harness (lm-eval) tasks on base and tuned model with its prompts and scores; one model in memory.

The harness gets the adapted model; for the base the adapter is disabled around the run. Tasks are the harness's own, by
name, or the user's YAML files in a folder, which need no network if their data is on this machine.
"""

import contextlib
import copy
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.foundation.chat_rendering import render_chat_template
from ..core.training.trained_model import TrainedModel
from ..errors import ModelError, UsageError, format_install_command, suggest
from ..extras.chat_templates import is_built_in_template
from .eval_result import WHO, LmEvalTaskScores


def load_lm_eval_task_manager(task_names: Sequence[str], folder: Path | None) -> Any:
    """Return the harness's task manager after checking that it knows every named task.

    Raises:
        ModelError: lm-eval is not installed.
        UsageError: the folder or a task does not exist; the nearest name is given.
    """
    if importlib.util.find_spec("lm_eval") is None:
        message = "--tasks needs the package lm-eval, which is not installed"
        raise ModelError(message, hint=format_install_command("tasks"))
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-path {folder} is not a folder", "a folder of task YAML files")
    with _errors_only():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
    known = list(manager.all_tasks)
    for name in task_names:
        if name not in known:
            expected = f"one of the {len(known)} tasks of lm-eval, or the `task:` of a YAML file in --tasks-path"
            raise UsageError(f"there is no task {name!r}{suggest(name, known)}", expected, "lm-eval ls tasks")
    return manager


def score_base_and_tuned_by_lm_eval(
    trained: TrainedModel, task_names: Sequence[str], manager: Any
) -> dict[str, dict[str, LmEvalTaskScores]]:
    """Return the scores of base and tuned model by task and metric.

    `task_names` are tasks or groups, and `manager` is what `load_lm_eval_task_manager` returned.

    Raises:
        ModelError: the harness could not run a task; its message is included.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = copy.copy(trained.base.tokenizer)
    # A base that got a built-in template is no chat model: it is asked as such bases are compared, by plain text.
    chats = tokenizer.chat_template is not None and not is_built_in_template(tokenizer.chat_template)
    tokenizer.apply_chat_template = functools.partial(_render_chat, trained.base.tokenizer)
    results = {}
    for who in WHO:
        with _errors_only(), trained.model.disable_adapter() if who == "base" else contextlib.nullcontext():
            try:
                results[who] = simple_evaluate(
                    HFLM(pretrained=trained.model, tokenizer=tokenizer, batch_size=1),
                    tasks=list(task_names),
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                    apply_chat_template=chats,
                )
            except Exception as e:  # a task's own code and data can raise anything
                raise ModelError(
                    f"lm-eval could not run {', '.join(task_names)}: {type(e).__name__}: {e}",
                    "tasks whose data is on this machine, or a network to fetch it",
                    "--tasks-path FOLDER with tasks on local data (docs/eval.md)",
                ) from e
    scores: dict[str, dict[str, LmEvalTaskScores]] = {}
    for task, metrics in results["tuned"]["results"].items():
        higher_is_better = results["tuned"].get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, aggregation = key.partition(",")
            if not aggregation or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            found: dict[str, Any] = {}
            for who in WHO:
                figures = results[who]["results"][task]
                error = figures.get(f"{metric}_stderr,{aggregation}")
                found |= {who: figures[key], f"{who}_stderr": error if isinstance(error, int | float) else None}
            name = metric if aggregation == "none" else f"{metric} ({aggregation})"
            scores.setdefault(task, {})[name] = LmEvalTaskScores(**found, higher_is_better=higher_is_better.get(metric))
    return scores


def _render_chat(
    tokenizer: Any,
    chat: Sequence[dict[str, Any]],
    *,
    tokenize: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Render as transformers' method does, as text, within the steps that a template may take."""
    text = render_chat_template(tokenizer, chat, add_generation_prompt=add_generation_prompt, **variables)
    if continue_final_message:
        last = chat[-1]["content"].strip()
        text = text[: text.rindex(last) + len(last)]
    return text


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
