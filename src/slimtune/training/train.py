"""One run, from a recipe to an adapter and its report.

recipe ─▶ data ─▶ plan ─▶ base ─▶ adapter ─▶ training loop ─▶ best checkpoint ─▶ adapter/, result.json, report.html
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from ..adapters import state_dict as adapter_files
from ..adapters.export_formats import get_export_formats
from ..attention.register import packed_attention
from ..config import Recipe
from ..data.collator import Collator, Example
from ..data.packing import bin_pack, pack_sequences
from ..data.validation.report import format_issue, format_verdict, raise_if_invalid
from ..errors import DataError, RunError, SlimtuneError, UsageError
from ..models.dtype import pick_device, pick_dtype
from ..models.loader import Base
from ..reporting import versions, write_report
from ..run_dir import ADAPTER_FILE, RunDir, to_json, write_json
from ..setup import (
    Datasets,
    attach_adapter,
    build_collator,
    load_base_from_recipe,
    load_datasets,
    load_tokenizer_from_recipe,
    require_packages,
    with_adapter_config,
)
from ..train_step.memory_savings import compile_layers, enable_activation_checkpointing
from ..utils import distributed
from ..utils.device import peak_memory
from ..utils.files import translate_disk_full, write_atomic
from ..utils.formatting import format_bytes, format_count
from . import checkpoint
from .fsdp import apply_fsdp
from .loop import TrainingLoop
from .memory_probe import planned_bytes, probe_memory
from .oom_recovery import EVENT, OomRecovery
from .progress import ProgressLogger, require_trackers, start_trackers

INIT_ADAPTER = "start"
"""Folder in a run folder with the adapter that the run started from, so that the run can be resumed without it."""

Planner = Callable[[Recipe, Sequence[int]], Mapping[str, Any] | None]
"""Plans a recipe for rows of these lengths in tokens. Returns the plan as plain values, None if it cannot be planned;
raises if the run does not fit."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, with a checkpoint."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    init_adapter: Path | None = None,
    planner: Planner = lambda *_: None,
    force: bool = False,
) -> dict[str, Any]:
    """Run a recipe; return what `slimtune train --json` prints.

    Args:
        recipe: model, data, method and training settings, and the run folder.
        resume: continue from the newest undamaged checkpoint in the run folder; from the beginning if there is none.
        init_adapter: a run or an adapter folder; start from this adapter's weights.
        planner: called before the base is loaded; training keeps to the plan's micro-batch size.
        force: train on data even if its validation finds faults.

    Raises:
        UsageError: the recipe cannot be carried out; nothing was written.
        SlimtuneError: the data, the model or the machine prevents it.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    started = time.perf_counter()
    settings = recipe.train
    run = RunDir(Path(recipe.output_dir))
    created_group = distributed.init_distributed()
    distributed.install_sigterm_watcher(f"slimtune train {run.recipe_file} --resume")

    # Recipe: when resuming it must be the run's own; the adapter to start from brings its method's settings.
    if resume:
        check_same_recipe(run, recipe)
        if (run.path / INIT_ADAPTER).is_dir():
            init_adapter = run.path / INIT_ADAPTER
    if init_adapter is not None:
        recipe = with_adapter_config(recipe, init_adapter)

    # Data and plan, before a weight is loaded.
    data = distributed.run_on_all_ranks(lambda: load_training_data(recipe, force))
    plan = distributed.run_on_main(lambda: planner(recipe, data.lengths().tolist()))

    # Base and adapter. A base that is sharded is loaded to CPU memory, by one process of a machine at a time.
    device = distributed.run_on_all_ranks(lambda: pick_training_device(recipe.model.device))
    shard = settings.fsdp and distributed.world_size() > 1
    mesh = init_device_mesh(device.type, (distributed.world_size(),)) if shard else None

    def load_model() -> tuple[Base, Any]:
        base = load_training_base(recipe, device, to_cpu=shard)
        model = attach_adapter(base, recipe, init_adapter, data.train)
        if mesh is not None:
            apply_fsdp(model, mesh, device)
            base.device = device
        return base, model

    base, model = distributed.run_on_all_ranks(load_model, in_turns=shard)
    loading_peak = peak_memory(device)

    # Run folder and loop. Until the first step nothing is lost: the folder is removed if something fails.
    if not resume:
        distributed.run_on_main(lambda: create_run_dir(recipe, data, model if init_adapter else None))
    logger = ProgressLogger(run, device)
    try:
        logger.trackers = start_trackers(recipe, run)
        if init_adapter is not None:
            logger.say(f"continuing from {init_adapter}, with its settings of the method")
        describe_run(logger, recipe, base, model, data)
        longest = int(data.lengths().max())
        collator = build_collator(recipe, model, base.tokenizer, longest)
        if plan is not None and collator.max_tokens is not None:
            collator.max_tokens = min(collator.max_tokens, max(longest, plan["max_tokens_per_micro_batch"]))
        collator.max_tokens = min(
            distributed.all_gather_object(collator.max_tokens or longest)
        )  # the same in every process
        can_checkpoint = model.supports_gradient_checkpointing and not settings.gradient_checkpointing
        recovery = OomRecovery(
            collator,
            device,
            logger.say,
            logger.record,
            enable_checkpointing=(lambda: enable_activation_checkpointing(model)) if can_checkpoint else None,
            planned_bytes=None if plan is None else planned_bytes(plan, device)[1],
            # With a sharded base the others wait inside the failed pass, and cannot repeat it.
            any_failed=None if shard else lambda failed: distributed.all_reduce_sum([float(failed)])[0] > 0,
        )
        newest = None
        if resume:
            newest = distributed.run_on_main(lambda: checkpoint.find_newest_checkpoint(run.checkpoints, logger.say))
        loop = TrainingLoop(model, data.train, data.validation, settings, collator, recovery, run, logger, newest)
        logger.say(describe_packing(collator, data.train, loop.rows_per_step))
        if settings.compile:
            logger.say(f"{compile_layers(model)} layers will be compiled when they first run, which takes a while")
        if plan is not None:
            compare_with_plan(loop, data, plan)
    except SlimtuneError:
        logger.close()
        if not resume and distributed.is_main_process():
            shutil.rmtree(run.path)
        raise
    if resume:
        distributed.run_on_main(lambda: drop_later_metrics(loop))
    start_seconds = time.perf_counter() - started

    # Training. The blocks translate errors and must stay around the whole loop.
    with translate_disk_full(run.path), packed_attention(model), distributed.translate_peer_errors():
        loop.run_to_end()
    distributed.barrier()
    step = loop.state.step
    if step < loop.state.max_steps and not loop.stopped_early:
        logger.say(f"stopped at step {step}; go on with: slimtune train {run.recipe_file} --resume")
        raise Interrupted(f"stopped at step {step}")

    # Best checkpoint, adapter, result and report.
    peak = max(distributed.all_gather_object(max(loading_peak, peak_memory(device))))
    result = distributed.run_on_main(lambda: finish_run(recipe, base, data, loop, start_seconds, peak))
    if created_group:
        distributed.shutdown()
    return result


# --- recipe, data, base -----------------------------------------------------------------------------------------------


def check_same_recipe(run: RunDir, recipe: Recipe) -> None:
    """Raise UsageError unless the recipe is that of the run: with another one the steps would not line up."""
    RunDir.open(run.path, require_adapter=False)
    before, now = run.load_recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [k for k in before if k != "output_dir" and before[k] != now.get(k)]
    if changed:
        fields = [
            f"{k}.{name}: {value!r} then, {now[k].get(name)!r} now"
            for k in changed
            if isinstance(before[k], dict)
            for name, value in before[k].items()
            if value != now[k].get(name)
        ]
        raise UsageError(
            f"the recipe is not the one that the run in {run.path} was started with: {'; '.join(fields) or changed}",
            "the same recipe",
            f"slimtune train {run.recipe_file} --resume, or another --out",
        )


def load_training_data(recipe: Recipe, force: bool) -> Datasets:
    """Check that the recipe's packages are there, and load its rows; raise DataError for faulty or missing rows."""
    require_packages(recipe)
    require_trackers(recipe.train.report_to)
    data = load_datasets(recipe, load_tokenizer_from_recipe(recipe))
    for report in filter(None, data.data_reports.values()):
        if not force:
            raise_if_invalid(report)
    if not data.train:
        raise DataError(f"{recipe.data.train} leaves no row to train on", "at least one row")
    return data


def pick_training_device(name: str) -> torch.device:
    """Return the device of this process: with several processes on GPUs, each has its own."""
    device = pick_device(name)
    if distributed.world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UsageError(
            f"model.device is {name} for {distributed.world_size()} processes",
            "auto or cuda, where each process takes its own GPU, or cpu",
            "--set model.device=auto",
        )
    torch.cuda.set_device(own := torch.device(distributed.local_device()))
    return own


def load_training_base(recipe: Recipe, device: torch.device, *, to_cpu: bool) -> Base:
    """Load the recipe's base to its device, or to CPU memory in that device's dtype; raise UsageError for float16."""
    dtype = str(pick_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    model = recipe.model.model_copy(update={"device": "cpu" if to_cpu else str(device), "dtype": dtype})
    base = load_base_from_recipe(recipe.model_copy(update={"model": model}))
    if base.dtype == torch.float16:
        raise UsageError(
            "the weights are float16, in which gradients vanish or overflow without a loss scaler",
            "bfloat16 or float32 for training",
            "--dtype bfloat16 or --dtype float32",
        )
    return base


# --- before the first step --------------------------------------------------------------------------------------------


def create_run_dir(recipe: Recipe, data: Datasets, init_model: Any) -> None:
    """Create the run folder with the recipe, the data report, and the adapter that the run starts from, if any."""
    run = RunDir.create(recipe.output_dir, recipe)
    write_json(run.data_file, data.data_reports)
    if init_model is not None:
        adapter_files.save_adapter(init_model, run.path / INIT_ADAPTER, "default")


def describe_run(logger: ProgressLogger, recipe: Recipe, base: Base, model: Any, data: Datasets) -> None:
    """Say what is trained, on which rows, and in how many processes."""
    trained, total = model.get_nb_trainable_parameters()
    quantization = f"{base.quantization}, computing in " if base.quantization else ""
    logger.say(f"base: {base.source.name}, {quantization}{str(base.dtype).removeprefix('torch.')} on {base.device}")
    share = f"{format_count(trained)} of {format_count(total)} parameters train ({100 * trained / total:.2f} %)"
    logger.say(f"{model.match_report()}; {share}")
    logger.say(f"rows: {data.train_report.text()}")
    for name, report in data.data_reports.items():
        if report is not None:
            logger.say(f"{name} data: {format_verdict(report)}")
            for issue in report["issues"]:
                logger.say(f"  {issue['severity']}: {format_issue(issue)}")
    processes = distributed.world_size()
    if processes > 1:
        logger.say(f"{processes} processes, {distributed.local_world_size()} on this machine, share each step's rows")
    if recipe.train.fsdp:
        sharded = "each process keeps its part of the base and gathers one layer at a time"
        logger.say(f"train.fsdp: {sharded if processes > 1 else 'there is one process, which keeps the whole base'}")


def describe_packing(collator: Collator, rows: Sequence[Example], rows_per_step: int) -> str:
    """Return how the rows of a step are put together, and how many tokens that saves, as one line."""
    limit = f"at most {collator.max_tokens} tokens in a micro-batch"
    if not collator.packing:
        return f"rows are padded, {limit}"
    if not collator.layout:
        return f"rows are packed, {limit}"
    sample = [e["input_ids"] for e in rows[: 16 * rows_per_step]]
    packed = 0
    for at in range(0, len(sample), rows_per_step):
        step = sample[at : at + rows_per_step]
        for group in bin_pack(step, collator.max_tokens, share_prefix=collator.share_prefix):
            packed += len(pack_sequences([step[i] for i in group], share_prefix=collator.share_prefix).tokens)
    saved = 1 - packed / sum(map(len, sample))
    shared = f", shared prefixes are computed once ({100 * saved:.0f} % fewer tokens)" if saved else ""
    return f"rows are packed{shared}; {limit}"


def compare_with_plan(loop: TrainingLoop, data: Datasets, plan: Mapping[str, Any]) -> None:
    """Run the longest micro-batch once; say what memory it takes, and write that beside the plan."""
    collator, limit = loop.collator, loop.collator.max_tokens
    rows = [data.train[i] for i in np.argsort(data.train.lengths, kind="stable")[-loop.rows_per_step :]]
    probe = loop.recovery.run_in_micro_batches(
        "the longest micro-batch, run before the first step",
        rows,
        lambda: probe_memory(loop.model, collator, rows, plan),
        lambda: None,
    )
    if collator.max_tokens != limit:  # smaller than what was planned: the plan's lower bound does not apply
        probe = dataclasses.replace(probe, low=0)
    loop.logger.say(probe.text())
    if distributed.is_main_process():
        write_json(loop.run.plan_file, {"plan": plan, "probe": probe.to_dict()})


def drop_later_metrics(loop: TrainingLoop) -> None:
    """Say where the run continues, and remove the metrics of steps that will be repeated."""
    state = loop.state
    if state.step == state.max_steps or loop.stopped_early:
        loop.logger.say("every step is done already")
    elif state.step:
        loop.logger.say(f"resuming at step {state.step}")
    else:
        loop.logger.say("there is no checkpoint yet: starting from the beginning")
    metrics = [m for m in loop.run.load_metrics() if m.get("step", 0) <= state.step]
    write_atomic(loop.run.metrics_file, "".join(to_json(m) + "\n" for m in metrics))


# --- after the last step ----------------------------------------------------------------------------------------------


def finish_run(
    recipe: Recipe, base: Base, data: Datasets, loop: TrainingLoop, start_seconds: float, peak: int
) -> dict[str, Any]:
    """Save the best adapter, the result and the report; return the result."""
    run, state, model = loop.run, loop.state, loop.model
    if state.best_step is not None and state.best_step != state.step:
        best = run.checkpoints / f"{checkpoint.PREFIX}{state.best_step}"
        if damage := checkpoint.find_damage(best):
            raise RunError(f"the best checkpoint, {best}, cannot be loaded: {damage}", "a complete checkpoint")
        loop.load_adapter(best)
        loop.logger.say(f"taking the adapter of step {state.best_step}, which has the lowest validation loss")
    adapter_files.save_adapter(model, run.adapter, "default")
    base.tokenizer.save_pretrained(run.adapter)

    trained, total = model.get_nb_trainable_parameters()
    last_losses = state.train_losses[-max(1, len(state.train_losses) // 10) :]
    # LoftQ moves part of the base into the adapter, so the adapter belongs to its quantized base alone.
    changes_base = recipe.method.settings.get("init_lora_weights") == "loftq"
    result = {
        "run": str(run.path),
        "steps": state.step,
        "best_step": state.best_step or state.step,
        "epochs": round(state.step / loop.steps_per_epoch, 3),
        "rows": len(data.train),
        "trained_tokens": state.trained_tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": round(state.tokens_per_second, 2),
        "train_seconds": round(state.train_seconds, 3),
        "train_cpu_seconds": round(state.train_cpu_seconds, 3),
        "load_seconds": round(base.load_seconds, 3),
        "start_seconds": round(start_seconds, 3),
        "train_loss": sum(last_losses) / len(last_losses) if last_losses else None,
        "validation_loss": min((loss for _, loss in state.validation_losses), default=None),
        "peak_bytes": peak,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization,
        "device": str(base.device),
        "adapter": str(run.adapter),
        "stopped_early": loop.stopped_early,
        "prepare_seconds": round(base.prepare_seconds, 3),
        "adapter_bytes": (run.adapter / ADAPTER_FILE).stat().st_size,
        "trainable_params": trained,
        "total_params": total,
        "oom_events": sum(m.get("event") == EVENT for m in run.load_metrics()),
        "finished": datetime.now(UTC).isoformat(" ", "seconds"),
        "target_summary": str(model.match_report()),
        "data_report": {
            "train": data.train_report.to_dict(),
            "validation": data.validation_report.to_dict() if data.validation_report else None,
        },
        "export_formats": {
            "base_kind": base.source.kind,
            **dataclasses.asdict(get_export_formats(model, beside=not changes_base)),
        },
        "versions": versions(),
    }
    write_json(run.result_file, result)
    write_report(run)
    loop.logger.say(f"adapter: {run.adapter} ({format_bytes(result['adapter_bytes'])})")
    return result
