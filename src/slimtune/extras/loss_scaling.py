"""Dynamic loss scaling, for runs in float16: without it small gradients are rounded to 0.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it. If they contain
NaN or Inf although the loss is finite, the scale was too large: it is halved, and the step is computed again, from the
same random state. A usual scaler skips such a step, and its rows are lost.

Paper: Micikevicius et al. 2018, "Mixed Precision Training", https://arxiv.org/abs/1710.03740.
"""

import math
from collections.abc import Sequence

from ..core.data.collator import Example
from ..core.kernels.dropout import get_rng_states, set_rng_states
from ..core.training.training_loop import StepGradientStats, TrainingLoop

MAX_LOSS_SCALE = 2.0**16
STEPS_UNTIL_DOUBLED = 500


def compute_gradients_with_loss_scale(loop: TrainingLoop, rows: Sequence[Example]) -> StepGradientStats:
    """Compute and clip a step's gradients at the largest loss scale known to work; change the scale in `loop.state`.

    If no scale down to 1 gives finite gradients, the scale is not what is wrong: it stays, and the gradients that are
    returned are those at scale 1.
    """
    state = loop.state
    first_scale = scale = state.loss_scale or 1.0
    rng_states = get_rng_states(loop.device)
    stats = loop.compute_gradients_at_loss_scale(rows)
    while scale > 1 and not math.isfinite(stats.norm.item()) and math.isfinite(stats.loss.item()):
        loop.model.zero_grad()
        set_rng_states(rng_states)
        state.loss_scale = scale = scale / 2
        stats = loop.compute_gradients_at_loss_scale(rows)
    if not math.isfinite(stats.norm.item()):
        state.loss_scale = first_scale
        return stats
    state.steps_at_loss_scale = 1 if scale < first_scale else state.steps_at_loss_scale + 1
    if scale < first_scale:
        loop.logger.record({"event": "loss-scale", "step": state.step + 1, "from": first_scale, "to": scale})
    elif state.steps_at_loss_scale >= STEPS_UNTIL_DOUBLED and scale < MAX_LOSS_SCALE:
        state.loss_scale, state.steps_at_loss_scale = 2 * scale, 0
    return stats
