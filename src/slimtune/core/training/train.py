"""One run, from a recipe to an adapter and its report: prepare ─▶ loop ─▶ finish."""

from collections.abc import Collection
from pathlib import Path

from ..config import Recipe
from ..foundation import distributed
from .finish_run import InterruptedAfterCheckpoint as InterruptedAfterCheckpoint
from .finish_run import TerminatedAfterCheckpoint as TerminatedAfterCheckpoint
from .finish_run import save_final_results
from .prepare_run import Planner, plan_nothing, prepare_run
from .train_result import TrainResult
from .training_loop import TrainingLoop


@distributed.translate_communication_errors()
def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    init_adapter: Path | None = None,
    planner: Planner = plan_nothing,
    allow_faulty_rows: bool = False,
    accept_changed: Collection[str] = (),
) -> TrainResult:
    """Run a recipe; return what `slimtune train --json` prints.

    Args:
        recipe: model, data, method and training settings, and the run folder.
        resume: continue from the newest undamaged checkpoint in the run folder; from the beginning if there is none.
        init_adapter: a run or an adapter folder; start from this adapter's weights.
        planner: called before the base is loaded; training keeps to the plan's micro-batch size.
        allow_faulty_rows: train on data even if its validation finds faults.
        accept_changed: parts of what a resumed run, or `init_adapter`, was trained on that may have changed: "weights",
            "config", "tokenizer", "template", "rows", "recipe".

    Raises:
        UsageError: the recipe cannot be carried out; nothing was written.
        SlimtuneError: the data, the model or the machine prevents it.
        RunError: a loss or gradient is NaN or Inf, unless `train.on_nonfinite` is "skip".
        InterruptedAfterCheckpoint: Ctrl-C; a checkpoint was written.
        TerminatedAfterCheckpoint: SIGTERM or SIGHUP; a checkpoint was written.
    """
    created_group = distributed.create_process_group_if_needed()
    with prepare_run(
        recipe, resume=resume, init_adapter=init_adapter, planner=planner, allow_faulty_rows=allow_faulty_rows,
        accept_changed=accept_changed,
    ) as prepared:  # fmt: skip
        loop = TrainingLoop(prepared)
        loop.run()
        result = save_final_results(loop)
    if created_group:
        distributed.wait_and_destroy_process_group()
    return result
