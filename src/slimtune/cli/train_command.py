"""`slimtune train`: train an adapter as a recipe, flags, or both say."""

import logging
import os
import shlex
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from ..core.foundation.formatting import format_bytes, format_count, format_duration
from ..errors import ModelError, RunError, UsageError
from ..extras.accepted_changes import parse_accepted_parts
from .common import (
    WARNING,
    Json,
    make_console,
    make_error_console,
    print_fields,
    print_progress,
    read_adapter_of_mlx_lm,
)
from .input_checks import list_missing_base_and_data_errors
from .options import add_recipe_flags
from .planned_jobs import JOB, find_recipe_file
from .row_checks import require_valid_first_rows

if TYPE_CHECKING:  # they import torch, which takes seconds
    from ..core.training.prepare_run import Planner
    from ..core.training.prepared_run import MemoryEstimate
    from ..core.training.train_result import ForgettingResult, TrainResult

TASK_FLAGS = {"reward": "rewards", "context": "context", "sampler": "vllm_server_base_url"}
"""Flags of settings that only some tasks have, and the field of `task` that each sets."""


@add_recipe_flags("model", "data", "task", "method", "train", "output_dir")
def train_run(
    settings: dict[str, Any],
    job: Annotated[str | None, JOB] = None,
    force: Annotated[
        bool, Option("--force", help="Train even if the plan says it does not fit, or on faulty data.")
    ] = False,
    gpu: Annotated[
        str | None, Option(metavar="TEXT", help="The GPU that was planned for; an error if this machine has another.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run in --out from its last checkpoint.")] = False,
    init_adapter: Annotated[
        Path | None,
        Option(
            "--init-adapter",
            metavar="ADAPTER",
            help="Start from this adapter's weights.",
            callback=read_adapter_of_mlx_lm,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        Option(
            "--reward",
            metavar="REWARD",
            help="With --task grpo, rloo or reinforce: what scores an answer, file.py:function or a built-in reward "
            "such as numeric-match:COLUMN; docs/grpo.md lists them. Repeatable.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        Option(
            "--context",
            metavar="FILE",
            help="With --task context: the text that the model should do without, or a .txt or .md file with it.",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        Option(
            "--sampler",
            metavar="URL",
            help="With --task grpo, rloo or reinforce: the server that samples the answers, slimtune serve or vLLM; "
            "by default the model that trains.",
        ),
    ] = None,
    accept_changed: Annotated[
        str | None,
        Option(
            "--accept-changed",
            metavar="PARTS",
            help="With --resume or --init-adapter: what may have changed since then: weights, config, tokenizer, "
            "template, rows, recipe; with commas.",
        ),
    ] = None,
    as_json: Json = False,
) -> Any:
    """Train an adapter on your rows.

    RECIPE.yaml has the settings, or flags alone do (a base, --data and --out are needed), or both: flags override.
    """
    if resume and init_adapter is not None:
        expected = "--resume continues the run in --out, --init-adapter starts a new run from an adapter"
        raise UsageError("--resume and --init-adapter are both given", f"one of them: {expected}")
    for flag, value in (("reward", reward), ("context", context), ("sampler", sampler)):
        if value not in (None, []):
            _require_task_with_field(TASK_FLAGS[flag], flag, settings, job)
            settings[f"task.{TASK_FLAGS[flag]}"] = value
    accepted = parse_accepted_parts(accept_changed)
    if accepted and not (resume or init_adapter is not None):
        raise UsageError("--accept-changed has no effect without --resume or --init-adapter", hint="leave it out")
    if os.environ.get("RANK", "0") != "0":  # with several processes only the first one reports
        from transformers.utils.logging import disable_progress_bar

        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        disable_progress_bar()
    from ..core.config import load_recipe
    from ..core.training.run_dir import RunDir, find_adapter_folder
    from ..planning.gpu_specs import require_gpu_by_name

    recipe = find_recipe_file(job)
    if job is not None and recipe is None:
        if "model.name" in settings:
            raise UsageError(f"{job!r} and --model are both given", "one base, or a recipe and --model to override its")
        settings["model.name"] = job
    if resume and recipe is None and "model.name" not in settings and "output_dir" in settings:
        recipe = Path(str(settings["output_dir"])) / "recipe.yaml"
    if resume and recipe is not None and (recipe.parent / "checkpoints").is_dir():
        settings.setdefault("output_dir", str(recipe.parent))  # the run is where its own recipe is
    loaded = load_recipe(recipe, settings, list_missing_base_and_data_errors)
    if init_adapter is not None:
        find_adapter_folder(init_adapter)
    if gpu is not None:
        require_gpu_by_name(gpu)
    if not resume:
        RunDir.require_free(loaded.output_dir)  # before the base is loaded
    require_valid_first_rows(loaded.data, loaded.objective())

    from ..core.foundation import distributed
    from ..core.training.train import train
    from ..planning.this_machine import require_machine_has_gpu

    if gpu is not None:
        require_machine_has_gpu(gpu, loaded.model.device)

    result = train(
        loaded,
        resume=resume,
        init_adapter=init_adapter,
        planner=make_run_planner(force),
        allow_faulty_rows=force,
        accept_changed=accepted,
    )
    if not distributed.is_main_process():
        raise Exit
    if not as_json:
        _print_result(result, loaded)
    return result


def _require_task_with_field(field: str, flag: str, settings: dict[str, Any], job: str | None) -> None:
    """Raise UsageError if flags alone say what is trained, and by an objective without the field that a flag sets."""
    from ..core.config.objective_registry import list_objectives, load_objective_class

    def has_field(task: str) -> bool:
        return any(known.name == field for known in fields(load_objective_class(task)))

    task = str(settings.get("task.name", "sft"))
    if ("task.name" in settings or find_recipe_file(job) is None) and not has_field(task):
        raise UsageError(
            f"--{flag} is given, and the task {task} has no such setting",
            f"--task {' or '.join(filter(has_field, list_objectives()))}",
        )


def make_run_planner(allow_misfit: bool) -> "Planner":
    """Return a function that plans a run on this machine, prints the verdict, and refuses a run that does not fit."""

    def plan_run(recipe: Any, lengths: Any, content: Any) -> "MemoryEstimate | None":
        from ..core.foundation import distributed
        from ..planning.plan_request import build_plan_request
        from ..planning.planner import estimate_resources
        from ..planning.this_machine import detect_gpu_or_cpu_spec

        try:
            request = build_plan_request(
                recipe, detect_gpu_or_cpu_spec(recipe.model.device), lengths, distributed.world_size(), content
            )
            plan = estimate_resources(request, advise="none" if allow_misfit else "all")
        except ModelError as e:
            text = f"warning: this run is not planned, so it may run out of memory: {e.message}"
            make_error_console().print(text, style=WARNING)
            return None
        print_progress(f"plan: it {plan.verdict.replace('tight', 'may fit')} ({plan.reason})")
        if plan.verdict == "does not fit" and not allow_misfit:
            useful = [a for a in plan.advice if a.verdict != "does not fit"]
            advice = "; or ".join(f"{a.change} saves {format_bytes(a.saves)} ({a.verdict})" for a in useful[:4])
            raise RunError(
                f"this run does not fit: {plan.reason}",
                advice or "a smaller base, or a GPU with more memory: no setting is enough",
                "change it so, or --force to try anyway",
                code="cuda-out-of-memory",
            )
        return plan

    return plan_run


def _describe_forgetting(found: "ForgettingResult | None") -> str:
    if found is None:
        return ""
    reduced = f"; strength reduced to {found.strength:.3f}" if found.strength < 1 else ""
    return f"{found.change:.4f} nats per token of general text (budget {found.budget:g}{reduced})"


def _print_result(result: "TrainResult", recipe: Any) -> None:
    def loss(value: float | None, of: str) -> str:
        return "not measured" if value is None else f"{value:.4f} ({of})"

    percent = 100 * result.trainable_params / max(result.total_params, 1)
    seconds = [("load", result.load_seconds), ("prepare", result.prepare_seconds)]
    skipped = f" ({n} skipped: NaN or Inf)" if (n := result.skipped_steps) else ""
    print_fields([
        ("steps", f"{result.steps}{skipped}"),
        ("trained tokens", f"{format_count(result.trained_tokens)} ({result.tokens_per_second:.0f} /s)"),
        ("training loss", loss(result.train_loss, "mean over the last tenth of the steps")),
        ("validation loss", loss(result.validation_loss, f"step {result.best_step}, whose adapter is kept")),
        *([("forgetting", text)] if (text := _describe_forgetting(result.forgetting)) else []),
        ("trained parameters", f"{format_count(result.trainable_params)} ({percent:.2f} %)"),
        ("adapter", f"{result.adapter}, {format_bytes(result.adapter_bytes)}"),
        ("report", f"{result.run}/report.html"),
        ("peak memory", format_bytes(result.peak_bytes)),
        *((f"time to {name}", format_duration(value)) for name, value in seconds if value >= 0.05),
    ])  # fmt: skip
    from ..core.training.held_out_rows import MIN_EVAL_ROWS, find_test_or_validation_split

    run, split, held_out = shlex.quote(result.run), find_test_or_validation_split(recipe.data), result.held_out_rows
    if held_out is not None and held_out < MIN_EVAL_ROWS:
        split = None
    rows = {"test": "", "validation": " --split validation", None: " --data held_out.jsonl"}[split]
    chat = f"\n      slimtune chat {run}" if recipe.objective().task_type == "CAUSAL_LM" else ""
    make_console().print(f"next: slimtune eval {run}{rows}{chat}", soft_wrap=True)
