"""From a loop that has ended to the run's result: best adapter ─▶ adapter/ ─▶ result.json ─▶ reports."""

import signal
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ...errors import RunError, format_names
from ..adapters import adapter_files
from ..foundation import distributed
from ..foundation.device import count_peak_memory
from ..foundation.dtype_names import dtype_name
from ..foundation.files import write_json
from ..foundation.installed_versions import read_installed_versions
from ..foundation.registry import Registry
from .best_adapter import load_best_adapter_within_forgetting_budget
from .held_out_rows import count_rows_split_off_for_eval
from .oom_recovery import EVENT
from .run_dir import ADAPTER_FILE, CONFIG_FILE, RunDir
from .train_result import ExportFormatsResult, ExportSupport, TokenizedRowsResult, TrainResult
from .training_loop import TrainingLoop

EXPORT_SUPPORT: Registry[Callable[..., ExportSupport]] = Registry("slimtune.export_support", "list of export formats")
"""Functions that return the export formats of a model's adapter."""
RUN_REPORTS: Registry[Callable[[RunDir], Any]] = Registry("slimtune.run_reports", "run report")
"""Functions that write a report into the folder of a run that has ended, from the files in it."""


class InterruptedAfterCheckpoint(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, with a checkpoint."""


class TerminatedAfterCheckpoint(RunError):
    """A run was stopped by SIGTERM or SIGHUP, with a checkpoint; the exit code is 128 and the signal's number."""

    def __init__(self, message: str, expected: str = "", hint: str = "", exit_code: int = 143) -> None:
        super().__init__(message, expected, hint)
        self.exit_code = exit_code


def save_final_results(loop: TrainingLoop) -> TrainResult:
    """Save the best adapter, the result and the reports, once all processes have ended the loop; return the result.

    Raises:
        InterruptedAfterCheckpoint, TerminatedAfterCheckpoint: a signal stopped the run before its last step.
    """
    peak = max(distributed.all_gather_object(max(loop.prepared.loading_peak, count_peak_memory(loop.device))))
    _raise_if_stopped(loop)
    return _save_result(loop, peak)


def _raise_if_stopped(loop: TrainingLoop) -> None:
    """Raise what tells that a signal stopped the run, and how to continue it."""
    step, resume = loop.state.step, loop.run_dir.resume_command()
    if step == loop.state.max_steps or loop.stopped_early:
        return
    stopped = f"stopped at step {step}"
    if loop.stop_signal in (0, signal.SIGINT):
        loop.logger.say(f"{stopped}; go on with: {resume}")
        raise InterruptedAfterCheckpoint(stopped)
    name, hint = signal.Signals(loop.stop_signal).name, f"checkpoint-{step} is complete: {resume}"
    raise TerminatedAfterCheckpoint(f"{stopped} by {name}", hint=hint, exit_code=128 + loop.stop_signal)


@distributed.runs_on_main_and_broadcasts
def _save_result(loop: TrainingLoop, peak_bytes: int) -> TrainResult:
    """Save the best adapter, then the result and the reports; return the result."""
    run, prepared, state, model = loop.run_dir, loop.prepared, loop.state, loop.model
    data, base = prepared.data, prepared.base
    untrained = model.active_peft_config.find_untrained_experts(model.adapter_modules("default"))
    kept = load_best_adapter_within_forgetting_budget(loop)
    adapter_files.save_adapter(model, run.adapter, "default")
    base.tokenizer.save_pretrained(run.adapter)
    if data.classes is not None:  # AutoModelForSequenceClassification needs the labels to make the head
        write_json(run.adapter / CONFIG_FILE, base.model.config.to_dict())

    trained, total = model.get_nb_trainable_parameters()
    last_losses = state.train_losses[-max(1, len(state.train_losses) // 10) :]
    # LoftQ moves part of the base into the adapter, so the adapter belongs to its quantized base alone.
    changes_base = prepared.recipe.method_config().compensates_quantization
    result = TrainResult(
        run=str(run.path),
        steps=state.step,
        best_step=kept.step,
        epochs=round(state.step / loop.steps_per_epoch, 3),
        rows=len(data.train),
        held_out_rows=count_rows_split_off_for_eval(prepared.recipe, data),
        trained_tokens=state.trained_tokens,
        supervised_tokens=state.supervised_tokens,
        tokens_per_second=round(state.tokens_per_second, 2),
        train_seconds=round(state.train_seconds, 3),
        train_cpu_seconds=round(state.train_cpu_seconds, 3),
        load_seconds=round(base.load_seconds, 3),
        start_seconds=round(prepared.start_seconds, 3),
        train_loss=sum(last_losses) / len(last_losses) if last_losses else None,
        validation_loss=kept.validation_loss,
        forgetting=kept.forgetting,
        skipped_steps=state.skipped_steps,
        peak_bytes=peak_bytes,
        dtype=dtype_name(base.dtype),
        quantization=base.quantization,
        base_weights=dict(prepared.fingerprint.weights or {}),
        device=str(base.device),
        adapter=str(run.adapter),
        stopped_early=loop.stopped_early,
        prepare_seconds=round(base.prepare_seconds, 3),
        adapter_bytes=(run.adapter / ADAPTER_FILE).stat().st_size,
        trainable_params=trained,
        total_params=total,
        oom_events=sum(m.get("event") == EVENT for m in run.load_metrics()),
        finished=datetime.now(UTC).isoformat(" ", "seconds"),
        target_summary=str(model.match_report()),
        untrained_experts=untrained,
        data_report=TokenizedRowsResult(data.train_stats, data.validation_stats),
        export_formats=ExportFormatsResult(
            base.source.kind, EXPORT_SUPPORT.load("formats")(model, on_published_base=not changes_base)
        ),
        versions=read_installed_versions(),
    )
    write_json(run.result_file, result)
    for write_report in RUN_REPORTS.load_all().values():
        write_report(run)
    if untrained:
        count = sum(map(len, untrained.values()))
        some = format_names((f"{name}[{expert}]" for name, experts in untrained.items() for expert in experts), 4)
        loop.logger.say(f"{count} expert weights got no gradient, as no token was routed to them: {some}")
    return result
