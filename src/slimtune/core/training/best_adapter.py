"""Which adapter of a run is kept: that with the lowest validation loss, inside the forgetting budget if there is one.

The main process chooses it alone, after the last step.
"""

from collections.abc import Sequence
from typing import NamedTuple

from . import checkpoint
from .forgetting_budget import STRENGTH_SEARCHES
from .loss import count_supervised_targets
from .resuming import load_checkpoint_adapter_weights
from .train_result import ForgettingResult
from .training_loop import TrainingLoop


class _KeptAdapter(NamedTuple):
    """The adapter that a run keeps."""

    step: int
    validation_loss: float | None  # None: not measured
    forgetting: ForgettingResult | None  # None: the run has no budget


def load_best_adapter_within_forgetting_budget(loop: TrainingLoop) -> _KeptAdapter:
    """Load the best adapter; with a forgetting budget make it weaker if it is outside, or take an earlier one.

    With a budget the better one is kept of the best of all, weaker, and the best one inside the budget as it is.
    """
    state, budget = loop.state, loop.state.forgetting_budget
    step, loss = _load_best_adapter(loop, state.ranked, state.step)
    if budget is None:
        return _KeptAdapter(step, loss, None)
    loop.recovery.any_failed = bool  # the other processes wait
    known = dict(state.forgetting)
    before = forgetting = known[step] if step in known else loop.measure_forgetting(alone=True)
    strength, tried = 1.0, list[tuple[float, float]]()
    if not before <= budget:  # NaN is outside
        way = "an earlier one inside is kept, if there is one (it has no strength to reduce; a lower --lr forgets less)"
        weaker_loss = None
        if loop.has_strength:
            search = STRENGTH_SEARCHES.load("interpolation")
            strength, tried = search(loop.model, lambda: loop.measure_forgetting(alone=True), before, budget)
            forgetting = max((change for s, change in tried if s == strength), default=0.0)
            if loop.validation:
                weaker_loss = loss = loop.measure(loop.validation, loop.objective, alone=True)[1]["loss"]
            way = f"its strength is reduced to {strength:.3f}, where it forgets {forgetting:.4f}"
        loop.logger.say(
            f"the adapter of step {step} forgets {before:.4f} nats per token of a kind of general text, more than "
            f"its budget of {budget:g}: {way}; --forgetting-budget sets another budget, null none"
        )
        inside = [(a, at) for a, at in state.ranked_inside_budget if weaker_loss is None or not weaker_loss <= a]
        if inside and (found := _load_best_adapter(loop, inside, -1))[0] >= 0:
            (step, loss), strength = found, 1.0
            before = forgetting = known[step]
    result = ForgettingResult(
        budget=budget,
        tokens=sum(count_supervised_targets(row) for row in loop.general_rows),
        base_losses=state.general_base_losses,
        measured=state.forgetting,
        before=before,
        strength=strength,
        tried=tried,
        change=forgetting,
    )
    return _KeptAdapter(step, loss, result)


def _load_best_adapter(
    loop: TrainingLoop, ranked: Sequence[tuple[float, int]], loaded: int
) -> tuple[int, float | None]:
    """Load the first adapter of `ranked`, `(loss, step)`, that is not lost; return its step and validation loss.

    `loaded` is the step of the adapter that the model has; it stays if all others are lost. A checkpoint that was
    damaged or deleted is named.
    """
    for loss, step in ranked:
        if step == loaded:
            return step, loss
        folder = loop.run_dir.checkpoints / f"{checkpoint.PREFIX}{step}"
        if damage := checkpoint.describe_checkpoint_damage(folder):
            if (loss, step) == ranked[0]:
                loop.logger.say(f"the adapter of step {step}, with the lowest validation loss, is lost: {damage}")
            continue
        load_checkpoint_adapter_weights(loop.model, folder)
        loop.logger.say(f"taking the adapter of step {step}, which has the validation loss {loss:.4f}")
        return step, loss
    return loaded, None
