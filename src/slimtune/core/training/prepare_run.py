"""From a recipe to a run before its first step.

recipe ─▶ data ─▶ plan ─▶ base ─▶ adapter ─▶ run folder ─▶ collator ─▶ reference ─▶ optimizer ─▶ memory probe
"""

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from ...errors import SlimtuneError
from ..config import Recipe
from ..data.example_lengths import DatasetRowComposition, ExampleLength, count_tokens_per_row
from ..foundation import distributed
from ..foundation.device import count_peak_memory
from ..foundation.registry import Registry
from .adapted_model import load_base_and_adapted_model
from .base_model import LoadBase, load_base_model
from .datasets import load_training_datasets
from .default_learning_rate import fill_in_learning_rate
from .fingerprint_checks import FINGERPRINT_CHECKS
from .forgetting_budget import GENERAL_TEXTS, get_forgetting_budget
from .loss import build_run_collator
from .memory_savings import compile_and_count_layers
from .prepared_run import MemoryEstimate, PreparedRun
from .progress_logger import TRACKERS, ProgressLogger
from .resuming import (
    create_and_lock_run_dir,
    initialize_or_resume_run_in_place,
    report_resume_and_delete_later_metrics,
    resolve_recipe_adapter_and_lock_on_resume,
)
from .run_description import log_row_packing_and_warn_of_few_steps, log_run_description
from .run_dir import RUN_LOCKS, RunDir, RunLock

Planner = Callable[[Recipe, Sequence[ExampleLength], DatasetRowComposition], MemoryEstimate | None]
"""Plans a recipe for examples of these lengths and this content. Returns None if it cannot be planned.

Raises if the run does not fit.
"""

MEMORY_PROBES: Registry[Callable[[PreparedRun, MemoryEstimate, int], None]] = Registry(
    "slimtune.memory_probes", "memory probe"
)
"""Functions that run a part of a planned run, compare its memory with the plan, and write both into plan.json.

The last argument is the bytes that this process had resident at the start.
"""


def plan_nothing(recipe: Recipe, lengths: Sequence[ExampleLength], row_composition: DatasetRowComposition) -> None:
    """Plan no run."""


def prepare_run(
    recipe: Recipe,
    *,
    resume: bool = False,
    init_adapter: Path | None = None,
    planner: Planner = plan_nothing,
    allow_faulty_rows: bool = False,
    accept_changed: Collection[str] = (),
    load_base: LoadBase = load_base_model,
) -> PreparedRun:
    """Return a run before its first step; the caller must leave it as a context manager, which unlocks its folder.

    Nothing is left of a new run if an error ends this. Arguments and errors as for `train`; `load_base` loads the base.
    """
    started, resident = time.perf_counter(), psutil.Process().memory_info().rss
    run = RunDir(Path(recipe.output_dir))
    distributed.exit_on_sigterm_with_resume_hint(run.resume_command())
    with _release_on_error(RUN_LOCKS.load("files")(run)) as lock:
        recipe, init_adapter = resolve_recipe_adapter_and_lock_on_resume(
            run, recipe, lock, resume, init_adapter, accept_changed
        )
        # Packages, data and plan, before a weight is loaded.
        TRACKERS.load("accelerate").require_installed_trackers(recipe.train.report_to)
        data = load_training_datasets(recipe, allow_faulty_rows)
        has_budget = get_forgetting_budget(recipe) is not None
        text = GENERAL_TEXTS.load("files")(recipe.data.general_text) if has_budget else None
        objective = recipe.objective()
        distributed.runs_on_main_and_broadcasts(objective.require_servers)(recipe, data)
        lengths = data.lengths()
        plan = distributed.runs_on_main_and_broadcasts(planner)(recipe, lengths, data.train.content)

        base, model = load_base_and_adapted_model(recipe, data, init_adapter, load_base, allow_faulty_rows)
        loading_peak = count_peak_memory(base.device)
        recipe = fill_in_learning_rate(recipe, len(data.train), base.hidden_size)
        if os.path.isabs(base.source.spec):
            recipe = replace(recipe, model=replace(recipe.model, name=base.source.spec))
        fingerprint_run = distributed.runs_on_main_and_broadcasts(FINGERPRINT_CHECKS.load("files").fingerprint_run)
        fingerprint = fingerprint_run(run, recipe, data, base, resume, init_adapter, accept_changed)
        model.adapter_state.training_fingerprints["default"] = fingerprint.to_json()
        if not resume:
            create_and_lock_run_dir(run, recipe, lock, fingerprint, data.data_reports, init_adapter)

        logger = ProgressLogger(run, base.device)
        with _remove_unstarted_run(run, logger, keep=resume):
            logger.trackers = TRACKERS.load("accelerate").start_trackers(recipe, run)
            longest = max(max(count_tokens_per_row(length)) for length in lengths)
            collator = build_run_collator(recipe.train, model, base.tokenizer, longest)
            if plan is not None and collator.max_tokens is not None:
                collator.max_tokens = min(collator.max_tokens, max(longest, plan.max_tokens_per_micro_batch))
            collator.max_tokens = min(distributed.all_gather_object(collator.max_tokens or longest))
            prepared = PreparedRun(
                recipe=recipe,
                run=run,
                lock=lock,
                logger=logger,
                data=data,
                base=base,
                model=model,
                objective=objective,
                collator=collator,
                plan=plan,
                general_rows=[] if text is None else text.choose_rows(recipe, base.tokenizer, model, logger.say),
                loading_peak=loading_peak,
                init_adapter=init_adapter,
                fingerprint=fingerprint,
            )
            log_run_description(prepared)
            objective.prepare_run(prepared)
            initialize_or_resume_run_in_place(prepared, resume)
            log_row_packing_and_warn_of_few_steps(prepared)
            if recipe.train.compile:
                compiled = compile_and_count_layers(prepared.model)
                logger.say(f"{compiled} layers will be compiled when they first run, which takes a while")
            if plan is not None:
                MEMORY_PROBES.load("longest")(prepared, plan, resident)
        if resume:
            report_resume_and_delete_later_metrics(prepared)
        prepared.start_seconds = time.perf_counter() - started
        return prepared


@contextmanager
def _release_on_error(lock: RunLock) -> Iterator[RunLock]:
    """Give the lock back if an error leaves the block."""
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


@contextmanager
def _remove_unstarted_run(run: RunDir, logger: ProgressLogger, keep: bool) -> Iterator[None]:
    """Close the logger if an error leaves the block, and delete the run folder unless it is to `keep`."""
    try:
        yield
    except SlimtuneError:
        logger.close()
        if not keep and distributed.is_main_process():
            shutil.rmtree(run.path)
        raise
