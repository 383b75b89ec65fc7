"""Where a run starts: at the beginning, from another adapter, or where its newest checkpoint ends."""

import dataclasses
import json
import math
import random
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_scheduler

from ...errors import RunError, UsageError
from ..adapters import adapter_files
from ..adapters.adapter_tensors import load_adapter_tensors
from ..adapters.peft_config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from ..adapters.peft_config import PeftConfig
from ..config import MethodSettings, Recipe
from ..data.row_observer import RowFindingsSummary
from ..foundation import distributed
from ..foundation.files import to_json, write_atomic, write_json
from . import checkpoint
from .checkpoint import INITIAL_LOSS_SCALE, TrainingState
from .fingerprint_checks import FINGERPRINT_CHECKS, TrainingFingerprint
from .forgetting_budget import get_forgetting_budget
from .optimizer import build_optimizer
from .prepared_run import PreparedRun
from .run_dir import INIT_ADAPTER, RunDir, RunLock, find_adapter_folder, is_temporary_file_name


def resolve_recipe_adapter_and_lock_on_resume(
    run: RunDir, recipe: Recipe, run_lock: RunLock, resume: bool, init_adapter: Path | None, accept: Collection[str]
) -> tuple[Recipe, Path | None]:
    """Return the recipe, and the adapter to start from, that a run trains with.

    When resuming the recipe must be the run's own, and the run folder is locked and cleaned up. An adapter to start
    from brings its method's settings.
    """
    if resume:
        recipe = _prepare_resume(run, recipe, run_lock, accept)
        if (run.path / INIT_ADAPTER).is_dir():
            init_adapter = run.path / INIT_ADAPTER
    return (recipe if init_adapter is None else _with_adapter_config(recipe, init_adapter)), init_adapter


@distributed.runs_on_main_and_broadcasts
def _prepare_resume(run: RunDir, recipe: Recipe, lock: RunLock, accept: Collection[str]) -> Recipe:
    """Lock a run folder to resume it, after checking the recipe, and delete what a killed run left.

    Returns the recipe with the run's learning rate, if it has none of its own.
    """
    RunDir.open(run.path, require_adapter=False)
    if recipe.train.learning_rate == "auto":
        rate = run.load_recipe().train.learning_rate
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, learning_rate=rate))
    FINGERPRINT_CHECKS.load("files").require_recipe_unchanged_since_start(run, recipe, accept)
    lock.acquire()
    _delete_leftovers(run)
    return recipe


def _delete_leftovers(run: RunDir) -> None:
    """Delete the temporary files of a process that was killed; the run folder must be locked."""
    for leftover in (*run.path.glob(".*.*"), *run.checkpoints.glob(".partial-*")):
        if is_temporary_file_name(leftover.name) or leftover.parent == run.checkpoints:
            checkpoint.delete_path(leftover)


def _with_adapter_config(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe with the method settings of the adapter that training starts from; raise for another method."""
    folder = find_adapter_folder(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.name != recipe.method.name:
        raise UsageError(
            f"{folder} is a {config.name} adapter, the recipe's method is {recipe.method.name}",
            f"an adapter of the method {recipe.method.name}",
            f"--method {config.name}",
        )
    shared = {f.name for f in dataclasses.fields(PeftConfig)} | {"peft_type"}
    settings = {k: v for k, v in config.to_dict().items() if k not in shared and v is not None}
    return dataclasses.replace(recipe, method=MethodSettings(name=config.name, settings=settings))


@distributed.runs_on_main_and_broadcasts
def create_and_lock_run_dir(
    run: RunDir, recipe: Recipe, lock: RunLock, fingerprint: TrainingFingerprint,
    findings: Mapping[str, RowFindingsSummary | None], init_adapter: Path | None,
) -> None:  # fmt: skip
    """Create and lock the run folder, with `findings` by split and a copy of the adapter to start from."""

    def write_start(run: RunDir) -> None:
        lock.acquire()
        _delete_leftovers(run)
        if init_adapter is not None:
            (run.path / INIT_ADAPTER).mkdir()
            for name in (adapter_files.WEIGHTS_FILE, ADAPTER_CONFIG_FILE):
                write_atomic(run.path / INIT_ADAPTER / name, (find_adapter_folder(init_adapter) / name).read_bytes())
        write_json(run.data_file, findings)
        write_atomic(run.fingerprint_file, fingerprint.to_json())

    RunDir.create(run.path, recipe, write_start)


def initialize_or_resume_run_in_place(prepared: PreparedRun, resume: bool) -> None:
    """Seed the random numbers, and build the run's optimizer and schedule.

    When resuming, all of them, the adapter and the state are then those of the newest undamaged checkpoint; without a
    checkpoint the run starts from the beginning.
    """
    settings, run = prepared.settings, prepared.run
    max_steps = settings.count_steps(len(prepared.data.train))
    budget = get_forgetting_budget(prepared.recipe) if prepared.general_rows else None
    loss_scale = INITIAL_LOSS_SCALE if prepared.base.dtype == torch.float16 else None
    prepared.state = TrainingState(max_steps, forgetting_budget=budget, loss_scale=loss_scale)
    prepared.recovery.save_before_exit = lambda: checkpoint.describe_newest_checkpoint(run)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    newest = None
    if resume:
        find_newest = distributed.runs_on_main_and_broadcasts(checkpoint.find_newest_undamaged_checkpoint)
        newest = find_newest(run.checkpoints, prepared.logger.say)
    if newest is not None:  # before the optimizer is built: loading may replace parameters
        load_checkpoint_adapter_weights(prepared.model, newest)
        checkpoint.load_method_state(newest, prepared.model)
    for config in prepared.model.peft_config.values():
        config.on_train_begin(max_steps)
    prepared.optimizer = build_optimizer(
        prepared.model, settings.optimizer, lr=float(settings.learning_rate), weight_decay=settings.weight_decay
    )
    # The first rate of a schedule that warms up is 0: the run begins with the second.
    warmup_steps = math.ceil(settings.warmup_ratio * max_steps)
    prepared.scheduler = get_scheduler(
        "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler,
        prepared.optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_steps + bool(warmup_steps),
    )
    if warmup_steps:
        with warnings.catch_warnings(action="ignore"):  # torch expects a step of the optimizer first
            prepared.scheduler.step()
    if newest is not None:
        _restore_state(prepared, newest)
        if distributed.is_main_process():  # a kill after the last checkpoint was written left the old ones
            state, keep = prepared.state, settings.save_total_limit
            checkpoint.delete_old_checkpoints(run.checkpoints, keep, state.best_steps)


def load_checkpoint_adapter_weights(model: Any, folder: Path) -> None:
    """Load the adapter of a checkpoint into the model."""
    tensors, _ = adapter_files.read_adapter_tensors_and_metadata(folder)
    load_adapter_tensors(model, "default", tensors, source=str(folder))


def _restore_state(prepared: PreparedRun, folder: Path) -> None:
    """Restore everything but the weights from a checkpoint."""
    values = json.loads((folder / checkpoint.STATE_FILE).read_text())
    collator = prepared.collator
    collator.max_tokens, collator.max_rows = values.pop("max_tokens"), values.pop("max_rows")
    if values.pop("checkpointing"):
        prepared.recovery.enable_checkpointing()
    prepared.scheduler.load_state_dict(values.pop("scheduler"))
    losses = [(step, loss) for step, loss in values["validation_losses"] if math.isfinite(loss)]
    forgetting = [(step, change) for step, change in values["forgetting"]]
    prepared.state = TrainingState(**{**values, "validation_losses": losses, "forgetting": forgetting})
    prepared.optimizer.load_state_dict(checkpoint.load_optimizer(folder))
    checkpoint.restore_rng_state(folder)


@distributed.runs_on_main_and_broadcasts
def report_resume_and_delete_later_metrics(prepared: PreparedRun) -> None:
    """Say where a run continues, and delete the metrics of steps that will be repeated."""
    run, state, say = prepared.run, prepared.state, prepared.logger.say
    if state.step == state.max_steps or state.is_out_of_patience(prepared.settings.early_stopping_patience):
        say("every step is done already")
    else:
        start = "there is no checkpoint yet: starting from the beginning"
        say(f"resuming at step {state.step}" if state.step else start)
    file = run.metrics_file
    try:
        metrics = run.load_metrics()
        damage = "is a folder" if file.is_dir() else ""
    except RunError as e:
        metrics, damage = [], e.message.removeprefix(f"{file}, ")
    if damage:  # the log of the steps is not needed to continue them
        kept = checkpoint.rename_as_damaged_replacing_older(file)
        say(f"{file.name}: {damage}; the log begins again, the old one is now {kept.name}")
    write_atomic(file, "".join(to_json(m) + "\n" for m in metrics if m.get("step", 0) <= state.step))
