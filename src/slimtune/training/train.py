"""One run, from a recipe to an adapter with its record.

load base → attach → read rows → train (transformers' Trainer) → take the best checkpoint → adapter/, report.html
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import TrainingArguments

from ..adapters import state_dict as adapter_files
from ..adapters.export_formats import get_export_formats
from ..attention.packed_layout import packed_attention
from ..config import Recipe
from ..data.collator import Collator
from ..data.packing import bin_pack, pack_sequences
from ..data.validation.summary import format_issue, format_verdict, raise_if_invalid
from ..errors import DataError, RunError, SlimtuneError, UsageError
from ..models.dtype import pick_device, pick_dtype
from ..models.loader import Base
from ..reporting import versions, write_report
from ..run_dir import ADAPTER_FILE, RunDir, to_json, write_atomic
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
from ..train_step.loss import compile_layers
from ..train_step.memory_savings import enable_activation_checkpointing
from ..utils import distributed
from ..utils.files import translate_disk_full
from ..utils.formatting import format_bytes, format_count
from ..utils.memory import is_out_of_memory
from . import checkpoint
from .callbacks import EvalSaveSchedule, ProgressLogger, rate, stop_on_interrupt
from .fsdp import apply_fsdp
from .memory_probe import longest, peak_bytes, planned_bytes, probe
from .oom_recovery import EVENT, OomRecovery
from .trackers import log_metrics, require_trackers
from .trainer import SlimTrainer

START = "start"
"""Folder in a run's that holds the adapter it continues from, so that the run can be resumed by itself."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, with a checkpoint."""


Planner = Callable[[Recipe, Sequence[int]], Mapping[str, Any] | None]
"""Plans a recipe for rows of so many tokens each and gives the plan as plain values, or raises where it will not run;
None: it could not be planned."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    continue_from: Path | None = None,
    planner: Planner = lambda *_: None,
    force: bool = False,
) -> dict[str, Any]:
    """Run a recipe; return what `slimtune train --json` prints.

    Args:
        recipe: what to do.
        resume: go on from the newest whole checkpoint in the recipe's run folder (from the start if there is none).
        continue_from: start from this adapter's weights (a run or an adapter folder).
        planner: asked before a weight is loaded; training keeps to its plan, and says where it was off.
        force: train on data that a survey finds faulty.

    Raises:
        UsageError: what was asked for cannot be carried out; nothing was written.
        SlimtuneError: the work found a fault.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    joined = distributed.init_distributed()
    distributed.install_sigterm_watcher(f"slimtune train {RunDir(Path(recipe.output_dir)).recipe_file} --resume")
    result = _train(recipe, resume, continue_from, planner, force)
    if joined:
        distributed.shutdown()
    return result


def _train(recipe: Recipe, resume: bool, continue_from: Path | None, planner: Planner, force: bool) -> dict[str, Any]:
    run = _open(recipe) if resume else None
    if run is not None and (run.path / START).is_dir():
        continue_from = run.path / START
    if continue_from is not None:
        recipe = with_adapter_config(recipe, continue_from)
    began = time.perf_counter()
    rows = distributed.run_on_all_ranks(lambda: _rows(recipe, force))
    plan = distributed.run_on_main(lambda: planner(recipe, rows.lengths().tolist()))
    divide = recipe.train.fsdp and distributed.world_size() > 1
    mesh = init_device_mesh(_device(recipe).type, (distributed.world_size(),)) if divide else None
    base, model = distributed.run_on_all_ranks(lambda: _loaded(recipe, continue_from, mesh, rows), in_turns=divide)
    fresh = run is None
    if run is None:
        run = RunDir(Path(recipe.output_dir))
        distributed.run_on_main(lambda: _begin(recipe, run, model, rows, continue_from))
    watch = ProgressLogger(run, base.device)
    if continue_from is not None:
        watch.say(f"continuing from {continue_from}, with its settings of the method")
    _describe(watch, base, rows, model)
    if distributed.world_size() > 1:
        watch.say(
            f"{distributed.world_size()} processes, {distributed.local_world_size()} on this machine, share each step's rows"
        )
    if recipe.train.fsdp:
        alone = "there is one process, which holds the whole base"
        watch.say(f"train.fsdp: {'each holds its part of the base, and a layer at a time' if divide else alone}")
    most = peak_bytes(base.device)
    try:
        with distributed.hide_launcher_env():
            trainer, pace = build_trainer(recipe, run, base, rows, model, watch, plan)
        start = distributed.run_on_main(lambda: checkpoint.newest_sound(run.checkpoints, watch.say)) if resume else None
        if start is not None:
            trainer.take_room(start)
        if plan is not None:
            _probe(trainer, run, rows, plan, watch)
    except SlimtuneError:
        watch.close()
        if (
            fresh and distributed.is_main_process()
        ):  # nothing was trained: the same --out is free for the corrected command
            shutil.rmtree(run.path)
        raise
    if resume:
        distributed.run_on_main(lambda: _resume_from(run, start, watch))
    prepared = time.perf_counter() - began
    with (
        stop_on_interrupt(pace, watch),
        translate_disk_full(run.path),
        packed_attention(model),
        distributed.translate_peer_errors(),
    ):
        try:
            if start is None or not _over(trainer, pace, start, watch):
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            # Between the parts of a step that can be done again: what holds is the last checkpoint.
            raise trainer.relief.exhausted("training", trainer.relief.shortage(e), "what lies between two steps") from e
        finally:
            watch.close()
    distributed.barrier()
    if trainer.stopping() and trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        watch.say(f"stopped at step {step}; go on with: slimtune train {run.recipe_file} --resume")
        raise Interrupted(f"stopped at step {step}")
    most = max(distributed.all_gather_object(max(most, peak_bytes(base.device))))
    return distributed.run_on_main(lambda: _finish(recipe, run, base, rows, trainer, pace, watch, prepared, most))


def _rows(recipe: Recipe, force: bool) -> Datasets:
    require_packages(recipe)
    require_trackers(recipe.train.report_to)
    rows = load_datasets(recipe, load_tokenizer_from_recipe(recipe))
    for report in filter(None, rows.surveys.values()):
        if not force:
            raise_if_invalid(report)
    if not rows.train:
        raise DataError(f"{recipe.data.train} leaves no row to train on", "at least one row")
    return rows


def _loaded(recipe: Recipe, continue_from: Path | None, mesh: DeviceMesh | None, rows: Datasets) -> tuple[Base, Any]:
    """Load the base and attach the method; with a mesh, divide it, out of the machine's memory."""
    device = _device(recipe)
    dtype = str(pick_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    there = {"device": str(device if mesh is None else "cpu"), "dtype": dtype}
    base = load_base_from_recipe(recipe.model_copy(update={"model": recipe.model.model_copy(update=there)}))
    if base.dtype == torch.float16:
        raise UsageError(
            "the weights are float16, in which gradients vanish or overflow without a loss scaler",
            "bfloat16 or float32 for training",
            "--dtype bfloat16 or --dtype float32",
        )
    model = attach_adapter(base, recipe, continue_from, rows.train)
    if mesh is not None:
        base.device = device
        apply_fsdp(model, mesh, device)
    return base, model


def _device(recipe: Recipe) -> torch.device:
    """Return where this process trains: of several on a machine, each on a GPU of its own."""
    wanted = recipe.model.device
    device = pick_device(wanted)
    if distributed.world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UsageError(
            f"model.device is {wanted} for {distributed.world_size()} processes",
            "auto or cuda, where each process takes a GPU of its own, or cpu",
            "--set model.device=auto",
        )
    torch.cuda.set_device(mine := torch.device(distributed.local_device()))
    return mine


def _begin(recipe: Recipe, run: RunDir, model: Any, rows: Datasets, continue_from: Path | None) -> None:
    """Make the run folder, with what is known of the data and the adapter that is continued from."""
    RunDir.create(run.path, recipe)
    write_atomic(run.data_file, to_json(rows.surveys, indent=2) + "\n")
    if continue_from is not None:
        adapter_files.save_adapter(model, run.path / START, "default")


def _open(recipe: Recipe) -> RunDir:
    """Open the run to resume; a recipe that changed since is refused, since the steps would not line up."""
    run = RunDir.open(recipe.output_dir, require_adapter=False)
    then, now = run.load_recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [k for k in then if k != "output_dir" and then[k] != now.get(k)]
    if changed:
        parts = [
            f"{k}.{n}: {then[k][n]!r} then, {now[k].get(n)!r} now"
            for k in changed
            if isinstance(then[k], dict)
            for n in then[k]
            if then[k][n] != now[k].get(n)
        ]
        raise UsageError(
            f"the recipe is not the one the run in {run.path} was started with: {'; '.join(parts) or changed}",
            "the same recipe",
            f"slimtune train {run.recipe_file} --resume, or another --out",
        )
    return run


def _over(trainer: SlimTrainer, pace: EvalSaveSchedule, start: Path, watch: ProgressLogger) -> bool:
    """Return whether all steps were done when the run stopped; then the trainer stands at the last one."""
    state = json.loads((start / "trainer_state.json").read_text())
    losses = [h for h in state["log_history"] if "eval_loss" in h]
    if state["global_step"] < state["max_steps"] and not (losses and pace.patience):
        return False
    trainer.take_up(start)
    pace.stopped_early = trainer.state.global_step < trainer.state.max_steps and pace.spent()
    if trainer.state.global_step < trainer.state.max_steps and not pace.stopped_early:
        return False
    watch.say("every step is done already")
    return True


def laid_text(collator: Collator, rows: Datasets, rows_a_step: int) -> str:
    """Return how the rows of a step will lie, and what that saves, as one line."""
    most = f"{collator.room} tokens in one pass at most"
    if not collator.packing:
        return f"rows are padded, {most}"
    if not collator.layout:
        return f"rows lie one after another, {most}"
    some = [e["input_ids"] for e in rows.train[: 16 * rows_a_step]]
    steps = [some[at : at + rows_a_step] for at in range(0, len(some), rows_a_step)]
    laid = sum(
        len(pack_sequences([step[i] for i in pack], share=collator.share).tokens)
        for step in steps
        for pack in bin_pack(step, collator.room, share=collator.share)
    )
    saved = 1 - laid / sum(map(len, some))
    alike = f", what they begin with alike once ({100 * saved:.0f} % fewer tokens)" if saved else ""
    return f"rows lie in one sequence{alike}; {most}"


def _describe(watch: ProgressLogger, base: Base, rows: Datasets, model: Any) -> None:
    trained, every = model.get_nb_trainable_parameters()
    held = f"{base.quantization}, computing in " if base.quantization else ""
    watch.say(f"base: {base.source.name}, {held}{str(base.dtype).removeprefix('torch.')} on {base.device}")
    watch.say(
        f"{model.match_report()}; {format_count(trained)} of {format_count(every)} parameters train "
        f"({100 * trained / every:.2f} %)"
    )
    watch.say(f"rows: {rows.train_report.text()}")
    for name, report in rows.surveys.items():
        if report is not None:
            watch.say(f"{name} data: {format_verdict(report)}")
            for found in report["findings"]:
                watch.say(f"  {found['severity']}: {format_issue(found)}")


def build_trainer(
    recipe: Recipe,
    run: RunDir,
    base: Base,
    rows: Datasets,
    model: Any,
    watch: ProgressLogger,
    plan: Mapping[str, Any] | None,
    kind: type[SlimTrainer] = SlimTrainer,
) -> tuple[SlimTrainer, EvalSaveSchedule]:
    """Return the trainer of a recipe, and what sets its pace; `kind` is the trainer's class."""
    t = recipe.train
    rows_a_step = t.batch_size * t.gradient_accumulation_steps
    steps_an_epoch = math.ceil(len(rows.train) / rows_a_step)
    steps = t.max_steps or math.ceil(t.epochs * steps_an_epoch)
    pace = EvalSaveSchedule(t.eval_steps or steps_an_epoch, t.save_steps, t.early_stopping_patience)
    # transformers' own log lines go to the run's log file; warnings of theirs that are none of the user's too.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    args = TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=rows_a_step,
        learning_rate=t.learning_rate,
        lr_scheduler_type="constant_with_warmup" if t.lr_scheduler == "constant" else t.lr_scheduler,
        warmup_steps=math.ceil(t.warmup_ratio * steps),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch_fused",
        seed=t.seed,
        data_seed=t.seed,
        logging_steps=t.logging_steps,
        logging_strategy="steps",
        eval_strategy="no",
        save_strategy="no",
        report_to=(list(t.report_to) if distributed.is_main_process() else []) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
    )
    # One process trains on one device: with several cards visible, the Trainer would split a pack over them.
    args._n_gpu = min(1, args._n_gpu)
    if base.device.type == "cuda" and base.device.index is not None:
        vars(args)["_setup_devices"] = base.device  # found once and kept; it would say the first card
        torch.cuda.set_device(base.device)
    most = int(rows.lengths().max())
    collator = build_collator(recipe, model, base.tokenizer, most)
    if plan is not None and collator.room is not None:
        collator.room = min(collator.room, max(most, plan["max_tokens_per_micro_batch"]))
    collator.room = min(distributed.all_gather_object(collator.room or most))  # so that all divide a step alike
    watch.say(laid_text(collator, rows, rows_a_step))
    if t.compile:
        watch.say(f"{compile_layers(model)} layers will be compiled as they first run, which takes a while")
    relief = OomRecovery(
        collator,
        base.device,
        watch.say,
        run.append_metrics if distributed.is_main_process() else lambda _: None,
        checkpoint=None
        if t.gradient_checkpointing or not model.supports_gradient_checkpointing
        else lambda: enable_activation_checkpointing(model),
        planned_bytes=None if plan is None else planned_bytes(plan, base.device)[1],
        # Where the base is divided, a process that failed in a pass has left the others waiting in it.
        agreed=None if distributed.is_sharded(model) else _agreed,
    )
    trainer = kind(
        model,
        args,
        train=rows.train,
        validation=rows.validation,
        collator=collator,
        keep=t.save_total_limit,
        say=watch.say,
        relief=relief,
        callbacks=[pace, watch],
        optimizer=t.optimizer,
    )
    log_metrics(run, trainer.callback_handler.callbacks)
    for unwanted in ("PrinterCallback", "ProgressCallback"):
        for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == unwanted]:
            trainer.remove_callback(type(callback))
    pace.trainer = watch.trainer = trainer
    return trainer, pace


def _agreed(failed: bool) -> bool:
    """Return whether some process failed."""
    return distributed.all_reduce_sum([float(failed)])[0] > 0


def _probe(trainer: SlimTrainer, run: RunDir, rows: Datasets, plan: Mapping[str, Any], watch: ProgressLogger) -> None:
    """Run the longest pass, say what it takes, and write that beside the plan."""
    rows_a_step, room = trainer.args.per_device_train_batch_size, trainer.collator.room
    found = trainer.relief.passes(
        "the longest pass, run before the first step",
        longest(rows.train, rows_a_step),
        lambda: probe(trainer.model, trainer.collator, rows.train, rows_a_step, plan),
        lambda: None,
    )
    if trainer.collator.room != room:  # smaller than what was planned, for which no least was said
        found = dataclasses.replace(found, low=0)
    watch.say(found.text())
    if distributed.is_main_process():
        write_atomic(run.plan_file, to_json({"plan": plan, "probe": found.to_dict()}, indent=2) + "\n")


def _resume_from(run: RunDir, start: Path | None, watch: ProgressLogger) -> None:
    """Say where the run goes on, and take back the metrics of steps that will be done again."""
    step = checkpoint.step_of(start) if start else 0
    watch.say(f"resuming at step {step}" if start else "there is no checkpoint yet: starting from the beginning")
    kept = [m for m in run.load_metrics() if m.get("step", 0) <= step]
    write_atomic(run.metrics_file, "".join(to_json(m) + "\n" for m in kept))


def load_best_checkpoint(run: RunDir, trainer: SlimTrainer, load: Callable[[Path], None]) -> bool:
    """Load the checkpoint with the lowest validation loss; return False where the last step is it, or there is none.

    Raises:
        RunError: it is damaged.
    """
    best = trainer.best_step()
    if best is None or best == trainer.state.global_step:
        return False
    folder = run.checkpoints / f"checkpoint-{best}"
    if fault := checkpoint.fault_in(folder):
        raise RunError(f"the best checkpoint, {folder}, cannot be taken: {fault}", "a whole checkpoint")
    load(folder)
    return True


def figures(
    recipe: Recipe, run: RunDir, base: Base, trainer: SlimTrainer, rows: int, prepared: float, most: int
) -> dict[str, Any]:
    """Return what `result.json` says of the course of a run, whatever trained.

    Args:
        recipe: what was done.
        run: its folder.
        base: what it stands on.
        trainer: after its last step.
        rows: training rows.
        prepared: seconds before the first step.
        most: bytes of memory, at most.
    """
    t, steps, history = recipe.train, trainer.state.global_step, trainer.state.log_history
    losses = [h["loss"] for h in history if "loss" in h]
    validation = [h["eval_loss"] for h in history if "eval_loss" in h]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "run": str(run.path),
        "steps": steps,
        "best_step": trainer.best_step() or steps,
        "epochs": round(steps / math.ceil(rows / (t.batch_size * t.gradient_accumulation_steps)), 3),
        "rows": rows,
        "trained_tokens": trainer.trained_tokens,
        "supervised_tokens": trainer.supervised_tokens,
        "tokens_per_second": round(rate(trainer), 2),
        "train_seconds": round(trainer.train_seconds, 3),
        "train_cpu_seconds": round(trainer.train_cpu_seconds, 3),
        "load_seconds": round(base.load_seconds, 3),
        "start_seconds": round(prepared, 3),
        "train_loss": sum(last) / len(last) if last else None,
        "validation_loss": min(validation) if validation else None,
        "peak_bytes": most,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization,
        "device": str(base.device),
    }


def _finish(
    recipe: Recipe,
    run: RunDir,
    base: Base,
    rows: Datasets,
    trainer: SlimTrainer,
    pace: EvalSaveSchedule,
    watch: ProgressLogger,
    prepared: float,
    most: int,
) -> dict[str, Any]:
    """Take the best adapter, write it with the run's record, and return the result."""
    if load_best_checkpoint(run, trainer, trainer.load_adapter_of):
        best = trainer.best_step()
        watch.say(f"taking the adapter of step {best}, the one with the lowest validation loss")
    model: Any = trainer.model
    adapter_files.save_adapter(model, run.adapter, "default")
    base.tokenizer.save_pretrained(run.adapter)
    trained, every = model.get_nb_trainable_parameters()
    result = {
        **figures(recipe, run, base, trainer, len(rows.train), prepared, most),
        "adapter": str(run.adapter),
        "stopped_early": pace.stopped_early,
        "prepare_seconds": round(base.prepare_seconds, 3),
        "adapter_bytes": (run.adapter / ADAPTER_FILE).stat().st_size,
        "trainable_params": trained,
        "total_params": every,
        "out_of_memory": sum(m.get("event") == EVENT for m in run.load_metrics()),
        "finished": datetime.now(UTC).isoformat(" ", "seconds"),
        "adapted": str(model.match_report()),
        "data_report": {
            "train": rows.train_report.to_dict(),
            "validation": rows.validation_report.to_dict() if rows.validation_report else None,
        },
        "export_formats": {
            "base_kind": base.source.kind,
            **dataclasses.asdict(get_export_formats(model, beside=not _is_loftq(recipe))),
        },
        "versions": versions(),
    }
    write_atomic(run.result_file, json.dumps(result, indent=2) + "\n")
    write_report(run)
    watch.say(f"adapter: {run.adapter} ({format_bytes(result['adapter_bytes'])})")
    return result


def _is_loftq(recipe: Recipe) -> bool:
    """Return whether the adapter started as what quantization took from its base: it belongs to that one."""
    return recipe.method.settings.get("init_lora_weights") == "loftq"
