"""One run, from a recipe to an adapter and its report.

recipe ─▶ data ─▶ plan ─▶ base ─▶ adapter ─▶ training loop ─▶ best checkpoint ─▶ adapter/, result.json, report.html
"""

import dataclasses
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.device_mesh import init_device_mesh

from ...diagnostics.machine_facts import versions
from ...errors import ModelError, RunError, SlimtuneError, UsageError, format_names
from ...evaluation.run_report import write_report
from ..adapters import state_dict as adapter_files
from ..adapters.adapter_strength import find_neutral_values
from ..adapters.export_support import get_export_formats
from ..adapters.peft_config import PeftConfig
from ..attention.attention_functions import packed_attention, packing_unsupported_reason
from ..config import Recipe
from ..config.recipe import MIN_EVAL_ROWS
from ..data.collator import Collator, Example
from ..data.example_lengths import ExampleLength, RowContent, count_row_tokens
from ..data.general_text import BUILT_IN_TEXT, WINDOW, read_general_text
from ..data.row_observer import DataReport
from ..foundation import distributed
from ..foundation.device import peak_memory
from ..foundation.files import to_json, write_atomic, write_json
from ..foundation.formatting import format_bytes, format_count
from ..models.base_config import get_hidden_size, max_positions
from ..models.dtype import pick_device, pick_training_dtype
from ..models.loader import Base
from . import checkpoint
from .adapted_model import attach_adapter
from .base_model import LoadBase, load_base_model
from .datasets import Datasets, load_training_datasets
from .forgetting_budget import choose_general_rows
from .loss import build_collator
from .memory_probe import compare_with_plan, planned_bytes_range
from .memory_savings import apply_fsdp, compile_layers
from .nonfinite import find_nonfinite_weights
from .oom_recovery import EVENT
from .progress_logger import ProgressLogger, start_trackers
from .run_dir import ADAPTER_FILE, CONFIG_FILE, RunDir, RunLock, find_adapter_folder, is_temporary
from .training_loop import TrainingLoop
from .validation_scores import add_reference

INIT_ADAPTER = "start"
"""Folder in a run folder with the adapter that the run started from, so that the run can be resumed without it."""
FEW_STEPS = 30
"""A run of whole epochs with fewer optimizer steps gets a warning: by default one on fewer than 80 rows."""

Planner = Callable[[Recipe, Sequence[ExampleLength], RowContent], Mapping[str, Any] | None]
"""Plans a recipe for examples of these lengths and this content. Returns the plan as plain values, None if it cannot be
planned; raises if the run does not fit."""

TrainingSteps = Generator[TrainingLoop | Sequence[Example], None, dict[str, Any]]
"""A run that is trained step by step: its loop first, then the rows of each step; its result at the end."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, with a checkpoint."""


class Terminated(RunError):
    """A run was stopped by SIGTERM or SIGHUP, with a checkpoint; the exit code is 128 and the signal's number."""

    def __init__(self, message: str, expected: str = "", hint: str = "", exit_code: int = 143) -> None:
        super().__init__(message, expected, hint)
        self.exit_code = exit_code


@distributed.translate_peer_errors()
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
        RunError: a loss or gradient is NaN or Inf, unless `train.on_nonfinite` is "skip".
        Interrupted: Ctrl-C; a checkpoint was written.
        Terminated: SIGTERM or SIGHUP; a checkpoint was written.
    """
    created_group = distributed.init_distributed()
    steps = start_training(recipe, resume=resume, init_adapter=init_adapter, planner=planner, force=force)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: dict[str, Any] = done.value
            break
    if created_group:
        distributed.shutdown()
    return result


def start_training(
    recipe: Recipe,
    *,
    resume: bool = False,
    init_adapter: Path | None = None,
    planner: Planner = lambda *_: None,
    force: bool = False,
    load_base: LoadBase = load_base_model,
) -> TrainingSteps:
    """Yield the loop of a run before its first step, then the rows of each step before it is taken; return the result.

    Arguments as for `train`; `load_base` loads the base, with a head for its classes.
    """
    run = RunDir(Path(recipe.output_dir))
    distributed.install_sigterm_watcher(run.resume_command())
    lock = RunLock(run)
    try:
        return (yield from _train(recipe, run, lock, resume, init_adapter, planner, force, load_base))
    finally:
        lock.release()


def _train(
    recipe: Recipe,
    run: RunDir,
    lock: RunLock,
    resume: bool,
    init_adapter: Path | None,
    planner: Planner,
    force: bool,
    load_base: LoadBase,
) -> TrainingSteps:
    started, resident_at_start = time.perf_counter(), psutil.Process().memory_info().rss

    # Recipe: when resuming it must be the run's own; the adapter to start from brings its method's settings.
    if resume:
        recipe = distributed.run_on_main(lambda: open_run(run, recipe, lock))
        if (run.path / INIT_ADAPTER).is_dir():
            init_adapter = run.path / INIT_ADAPTER
    if init_adapter is not None:
        recipe = with_adapter_config(recipe, init_adapter)
    # Data and plan, before a weight is loaded.
    data = distributed.run_on_all_ranks(lambda: load_training_datasets(recipe, force))
    file = recipe.data.general_text or BUILT_IN_TEXT
    general_text = read_general_text(file) if recipe.train.forgetting_budget is not None else []
    lengths = data.lengths()
    plan = distributed.run_on_main(lambda: planner(recipe, lengths, data.train.content))

    # Base and adapter. A base that is sharded is loaded to CPU memory, by one process of a machine at a time.
    device = distributed.run_on_all_ranks(lambda: pick_training_device(recipe.model.device))
    dtype = pick_training_dtype(recipe.model.dtype, device)
    shard = recipe.train.fsdp and distributed.world_size() > 1
    mesh = init_device_mesh(device.type, (distributed.world_size(),)) if shard else None

    def load_model() -> tuple[Base, Any]:
        place = {"device": "cpu" if shard else str(device), "dtype": str(dtype).removeprefix("torch.")}
        base = load_base(recipe.model.model_copy(update=place), recipe.data.chat_template, data.classes)
        if not force:
            require_finite_weights(base)
        model = attach_adapter(base, recipe, init_adapter, data.train)
        if mesh is not None:
            apply_fsdp(model, mesh, device)
            base.device = device
        return base, model

    base, model = distributed.run_on_all_ranks(load_model, in_turns=shard)
    loading_peak = peak_memory(device)
    steps, has_own_rate = recipe.train.count_steps(len(data.train)), recipe.train.learning_rate != "auto"
    recipe = recipe.resolve_learning_rate(len(data.train), get_hidden_size(base.model.config))
    if os.path.isabs(base.source.spec):
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": base.source.spec})})
    settings = recipe.train

    # Run folder and loop. Until the first step nothing is lost: the folder is removed if something fails.
    def write_start(run: RunDir) -> None:
        lock.acquire()
        write_json(run.data_file, {name: report and report.to_json() for name, report in data.data_reports.items()})
        if init_adapter is not None:
            adapter_files.save_adapter(model, run.path / INIT_ADAPTER, "default")

    def create_run_dir() -> None:
        RunDir.create(run.path, recipe, write_start)

    if not resume:
        distributed.run_on_main(create_run_dir)
    logger = ProgressLogger(run, device)
    try:
        logger.trackers = start_trackers(recipe, run)
        if init_adapter is not None:
            logger.say(f"continuing from {init_adapter}, with its settings of the method")
        describe_run(logger, recipe, base, model, data)
        if not has_own_rate:
            default = f"the default of {recipe.method.name} for {steps} steps over {len(data.train)} rows on this base"
            logger.say(f"learning rate: {settings.learning_rate:g}, {default}; --lr sets another")
        longest = max(map(max, map(count_row_tokens, lengths)))
        collator = build_collator(settings, model, base.tokenizer, longest)
        if plan is not None and collator.max_tokens is not None:
            collator.max_tokens = min(collator.max_tokens, max(longest, plan["max_tokens_per_micro_batch"]))
        # The same in every process:
        collator.max_tokens = min(distributed.all_gather_object(collator.max_tokens or longest))
        planned = None if plan is None else planned_bytes_range(plan, device)[1]
        objective = recipe.objective()
        steps_and_seed = {"rows_per_step": settings.rows_per_step, "seed": settings.seed}
        data.train, data.validation = (
            objective.prepare_training_rows(rows, max_seq_len=recipe.data.max_seq_len, **steps_and_seed)
            for rows in (data.train, data.validation)
        )
        if objective.needs_reference:
            add_reference(run, data, model, collator, logger, disable=init_adapter is None)
        general: list[Example] = []
        if settings.forgetting_budget is not None:
            find_neutral_values(model, "default")  # raises for a method whose strength cannot be reduced
            context = max_positions(base.model.config) or 4 * WINDOW
            general = choose_general_rows(general_text, recipe.data.general_text, base.tokenizer, context)
        loop = TrainingLoop(model, data, settings, objective, collator, run, logger, resume, planned, general)
        if settings.max_steps is None and steps < FEW_STEPS:
            epochs = math.ceil(FEW_STEPS / loop.steps_per_epoch)
            more = f"more rows, or --epochs {epochs} for {epochs * loop.steps_per_epoch}"
            logger.say(f"warning: {steps} steps are few, and may change little: {more}")
        if settings.packing is None and (reason := packing_unsupported_reason(model)):
            logger.say(f"rows are not packed: {reason}")
        logger.say(describe_packing(collator, data.data_reports["train"]))
        if settings.compile:
            logger.say(f"{compile_layers(model)} layers will be compiled when they first run, which takes a while")
        if plan is not None:
            probe = compare_with_plan(loop, plan, resident_at_start)
            if distributed.is_main_process():
                write_json(run.plan_file, {"plan": plan, "probe": probe})
    except SlimtuneError:
        logger.close()
        if not resume and distributed.is_main_process():
            shutil.rmtree(run.path)
        raise
    if resume:
        distributed.run_on_main(lambda: drop_later_metrics(loop))
    start_seconds = time.perf_counter() - started

    # Training.
    try:
        with packed_attention(model):
            yield loop
            yield from loop.run_steps()
    finally:
        if distributed.is_main_process():
            restore_recipe(run, recipe, logger)
    # Best checkpoint, adapter, result and report. Only the main process writes them, after all have ended the loop.
    peak = max(distributed.all_gather_object(max(loading_peak, peak_memory(device))))
    if loop.state.step < loop.state.max_steps and not loop.stopped_early:
        stopped, step = f"stopped at step {loop.state.step}", loop.state.step
        if loop.stop_signal in (0, signal.SIGINT):
            logger.say(f"{stopped}; go on with: {run.resume_command()}")
            raise Interrupted(stopped)
        name, hint = signal.Signals(loop.stop_signal).name, f"checkpoint-{step} is complete: {run.resume_command()}"
        raise Terminated(f"{stopped} by {name}", hint=hint, exit_code=128 + loop.stop_signal)
    return distributed.run_on_main(lambda: finish_run(recipe, base, data, loop, start_seconds, peak))


# --- before the first step --------------------------------------------------------------------------------------------


def open_run(run: RunDir, recipe: Recipe, lock: RunLock) -> Recipe:
    """Open a run folder to resume it: check the recipe, take the lock, and remove what a killed run left.

    Returns the recipe with the run's learning rate, if it has none of its own.
    """
    RunDir.open(run.path, require_adapter=False)
    if recipe.train.learning_rate == "auto":
        rate = run.load_recipe().train.learning_rate
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": rate})})
    check_same_recipe(run, recipe)
    lock.acquire()
    for leftover in (*run.path.glob(".*.*"), *run.checkpoints.glob(".partial-*")):
        if is_temporary(leftover.name) or leftover.parent == run.checkpoints:
            checkpoint.remove(leftover)
    return recipe


def check_same_recipe(run: RunDir, recipe: Recipe) -> None:
    """Raise UsageError unless the recipe is that of the run: with another one the steps would not line up."""
    before, now = run.load_recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
    changed = [
        f"{section}.{name}: {before[section].get(name)!r} then, {now[section].get(name)!r} now"
        for section in before
        if section != "output_dir"
        for name in before[section] | now[section]
        if before[section].get(name) != now[section].get(name)
        and (section, name) != ("train", "on_nonfinite")  # changes no step that is done
    ]
    if changed:
        message = f"the recipe is not the one that the run in {run.path} was started with: {'; '.join(changed)}"
        raise UsageError(message, "the same recipe", f"{run.resume_command()}, or another --out")


def with_adapter_config(recipe: Recipe, adapter: Path) -> Recipe:
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
    return recipe.model_copy(update={"method": type(recipe.method)(name=config.name, **settings)})


def require_finite_weights(base: Base) -> None:
    """Raise ModelError if a weight of the base contains NaN or Inf."""
    if names := find_nonfinite_weights(base.model):
        raise ModelError(
            f"{base.source.name} is damaged: {len(names)} of its weights contain NaN or Inf: {format_names(names, 4)}",
            "finite weights",
            "download it again, or --force to train on it anyway",
        )


def pick_training_device(name: str) -> torch.device:
    """Return the device of this process: with several processes on GPUs, each has its own."""
    device, gpus = pick_device(name), torch.cuda.device_count()
    if distributed.world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None or distributed.local_rank() >= gpus:
        raise UsageError(
            f"model.device is {name} for {distributed.local_world_size()} processes on a machine with {gpus} GPUs",
            "auto or cuda, where each process takes its own GPU, or cpu",
            "--set model.device=auto (or cpu), and at most one process per GPU (--nproc-per-node)",
        )
    torch.cuda.set_device(own := torch.device(f"cuda:{distributed.local_rank()}"))
    return own


def describe_run(logger: ProgressLogger, recipe: Recipe, base: Base, model: Any, data: Datasets) -> None:
    """Say what is trained, on which rows, and in how many processes."""
    trained, total = model.get_nb_trainable_parameters()
    quantization = f"{base.quantization}, computing in " if base.quantization else ""
    logger.say(f"base: {base.source.name}, {quantization}{str(base.dtype).removeprefix('torch.')} on {base.device}")
    share = f"{format_count(trained)} of {format_count(total)} parameters train ({100 * trained / total:.2f} %)"
    logger.say(f"{model.match_report()}; {share}")
    logger.say(f"rows: {data.train_stats.text()}")
    for split, rows in (("validation", data.validation), ("test", data.test)):
        if getattr(recipe.data, split) is None and getattr(recipe.data, f"{split}_fraction") > 0:
            logger.say(f"{len(rows.documents)} of them set aside for {split}")
    if (documents := data.train.documents) is not data.train:
        logger.say(
            f"{len(documents):,} documents to train on, cut into {len(data.train):,} windows of at most "
            f"{recipe.data.max_seq_len} tokens, elsewhere in each epoch"
        )
    if (warning := warn_of_few_held_out_rows(recipe, data)) is not None:
        logger.say(f"warning: {warning}")
    for name, report in data.data_reports.items():
        if report is not None:
            verdict, *lines = report.summarize()
            for line in (f"{name} data: {verdict}", *lines):
                logger.say(line)
    processes = distributed.world_size()
    if processes > 1:
        logger.say(f"{processes} processes, {distributed.local_world_size()} on this machine, share each step's rows")
    if recipe.train.fsdp:
        sharded = "each process keeps its part of the base and gathers one layer at a time"
        logger.say(f"train.fsdp: {sharded if processes > 1 else 'there is one process, which keeps the whole base'}")


def count_held_out_rows(recipe: Recipe, data: Datasets) -> int | None:
    """Return how many rows `slimtune eval` measures on without a file; None if it has none, or reads a file of them."""
    split = recipe.eval_split()
    return None if split is None or getattr(recipe.data, split) is not None else len(getattr(data, split).documents)


def warn_of_few_held_out_rows(recipe: Recipe, data: Datasets) -> str | None:
    """Return why `slimtune eval` will not be able to say whether the run is better, and the flag that helps."""
    count, split = count_held_out_rows(recipe, data), recipe.eval_split()
    if count is None or count >= MIN_EVAL_ROWS:
        return None
    rows = sum(len(part.documents) for part in (data.train, data.validation, data.test))
    share = math.ceil(100 * MIN_EVAL_ROWS / rows) / 100
    way = f"--{split}-fraction {share:g} sets {round(share * rows)} aside" if share <= 0.5 else "write more rows"
    few = "1 held-out row is" if count == 1 else f"{count} held-out rows are"
    least = f"slimtune eval needs {MIN_EVAL_ROWS} to say whether the tuned model is better"
    return f"{few} too few: {least}; {way}, or give others to it later: slimtune eval RUN --data held_out.jsonl"


def describe_packing(collator: Collator, report: DataReport | None) -> str:
    """Return how the rows of a step are put together, and the tokens that saves by the data report, as one line."""
    limit = f"at most {collator.max_tokens} tokens in a micro-batch"
    if not collator.layout:
        return f"rows are {'packed' if collator.packing else 'padded'}, {limit}"
    saved = report.saved_share if report is not None and collator.share_prefix else 0.0
    shared = f", shared prefixes are computed once ({100 * saved:.1f} % fewer tokens)" if saved else ""
    return f"rows are packed{shared}; {limit}"


def drop_later_metrics(loop: TrainingLoop) -> None:
    """Say where the run continues, and remove the metrics of steps that will be repeated."""
    step = loop.state.step
    if step == loop.state.max_steps or loop.stopped_early:
        loop.logger.say("every step is done already")
    else:
        start = "there is no checkpoint yet: starting from the beginning"
        loop.logger.say(f"resuming at step {step}" if step else start)
    file = loop.run.metrics_file
    try:
        metrics = loop.run.load_metrics()
        damage = "is a folder" if file.is_dir() else ""
    except RunError as e:
        metrics, damage = [], e.message.removeprefix(f"{file}, ")
    if damage:  # the log of the steps is not needed to continue them
        kept = checkpoint.set_aside(file)
        loop.logger.say(f"{file.name}: {damage}; the log begins again, the old one is now {kept.name}")
    write_atomic(file, "".join(to_json(m) + "\n" for m in metrics if m.get("step", 0) <= step))


def restore_recipe(run: RunDir, recipe: Recipe, logger: ProgressLogger) -> None:
    """Write the recipe again if it was deleted while the run trained: nothing can be done with a run without it."""
    if run.path.is_dir() and not run.recipe_file.exists():
        write_atomic(run.recipe_file, recipe.to_yaml())
        logger.say(f"{run.recipe_file} was deleted while the run trained; it is written again")


# --- after the last step ----------------------------------------------------------------------------------------------


def finish_run(
    recipe: Recipe, base: Base, data: Datasets, loop: TrainingLoop, start_seconds: float, peak: int
) -> dict[str, Any]:
    """Save the best adapter, the result and the report; return the result."""
    run, state, model = loop.run, loop.state, loop.model
    untrained = model.active_peft_config.find_untrained_experts(model.adapter_modules("default"))
    best_step, best_loss, forgetting = loop.keep_best_adapter()
    adapter_files.save_adapter(model, run.adapter, "default")
    base.tokenizer.save_pretrained(run.adapter)
    if data.classes is not None:  # AutoModelForSequenceClassification needs the labels to make the head
        write_json(run.adapter / CONFIG_FILE, base.model.config.to_dict())

    trained, total = model.get_nb_trainable_parameters()
    last_losses = state.train_losses[-max(1, len(state.train_losses) // 10) :]
    # LoftQ moves part of the base into the adapter, so the adapter belongs to its quantized base alone.
    changes_base = recipe.method.settings.get("init_lora_weights") == "loftq"
    result = {
        "run": str(run.path),
        "steps": state.step,
        "best_step": best_step,
        "epochs": round(state.step / loop.steps_per_epoch, 3),
        "rows": len(data.train),
        "held_out_rows": count_held_out_rows(recipe, data),
        "trained_tokens": state.trained_tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": round(state.tokens_per_second, 2),
        "train_seconds": round(state.train_seconds, 3),
        "train_cpu_seconds": round(state.train_cpu_seconds, 3),
        "load_seconds": round(base.load_seconds, 3),
        "start_seconds": round(start_seconds, 3),
        "train_loss": sum(last_losses) / len(last_losses) if last_losses else None,
        "validation_loss": best_loss,
        "forgetting": forgetting,
        "skipped_steps": state.skipped_steps,
        "peak_bytes": peak,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": base.quantization,
        "base_weights": base.weight_hashes,
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
        "untrained_experts": untrained,
        "data_report": {
            "train": data.train_stats.to_dict(),
            "validation": data.validation_stats.to_dict() if data.validation_stats else None,
        },
        "export_formats": {
            "base_kind": base.source.kind,
            **dataclasses.asdict(get_export_formats(model, on_published_base=not changes_base)),
        },
        "versions": versions(),
    }
    write_json(run.result_file, result)
    write_report(run)
    if untrained:
        count = sum(map(len, untrained.values()))
        some = format_names((f"{name}[{expert}]" for name, experts in untrained.items() for expert in experts), 4)
        loop.logger.say(f"{count} expert weights got no gradient, as no token was routed to them: {some}")
    loop.logger.say(f"adapter: {run.adapter} ({format_bytes(result['adapter_bytes'])})")
    return result
