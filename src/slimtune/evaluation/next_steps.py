"""What mends an evaluation that does not pass: commands with numbers from the run, the likeliest first."""

import math
import shlex
from collections.abc import Iterator

from ..core.config import Recipe
from ..core.training.forgetting_budget import get_forgetting_budget
from ..core.training.held_out_rows import MIN_EVAL_ROWS
from .eval_result import EvalResult, KTOEvalResult, NextStep, PolicyEvalResult, TextEvalResult, TextOrPairEvalResult


def list_next_steps(result: EvalResult, recipe: Recipe | None) -> list[NextStep]:
    """Return what to do about a result that does not pass; empty if it passes.

    Args:
        result: the whole result, its verdict made.
        recipe: the run's recipe, whose numbers the commands change; None: an adapter folder, whose run is not here.
    """
    if result.verdict.passed:
        return []
    steps = []
    if result.measures.different_rows < MIN_EVAL_ROWS:
        more = f"slimtune eval {shlex.quote(result.run)} --data held_out.jsonl"
        steps.append(NextStep("measure on more rows", more))
    if recipe is None:
        return steps
    again = f"slimtune train {shlex.quote(f'{result.run}/recipe.yaml')} --out {shlex.quote(f'{result.run}-2')}"
    if isinstance(result, PolicyEvalResult) and any(probe.gain.low > 0 for probe in result.measures.probes):
        # More training of such rewards would learn those answers.
        return [*steps, NextStep("change the rewards, which pay for answers without any worth; then", again)]
    return [*steps, *(NextStep(why, f"{again} {flag}") for why, flag in _list_changes(result, recipe))]


def _list_changes(result: EvalResult, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield why a flag helps, and the flag."""
    train = recipe.train
    rate = None if train.learning_rate == "auto" else float(train.learning_rate)
    forgetting = result.forgetting if isinstance(result, TextEvalResult | PolicyEvalResult) else None
    if forgetting is not None and not forgetting.within:
        # The change of a loss near its minimum is quadratic in that of the weights, and those follow the rate.
        share = forgetting.budget / max(forgetting.change.value, forgetting.budget)
        budget = min(forgetting.budget / 2, (get_forgetting_budget(recipe) or math.inf) * share)
        yield "keep what the base knows", f"--forgetting-budget {budget:.1g}"
        if rate is not None:
            yield "learn more slowly", f"--lr {0.8 * rate * math.sqrt(share):.1g}"
    if result.improved:
        return
    has_pairs = isinstance(result, TextOrPairEvalResult) and result.measures.preference is not None
    if rate is not None and (has_pairs or isinstance(result, KTOEvalResult)):
        yield "learn faster", f"--lr {5 * rate:.1g}"
    elif rate is not None and (
        (isinstance(result, TextEvalResult) and result.measures.loss_reduction.high < 0)
        or (isinstance(result, PolicyEvalResult) and result.measures.reward_gain.value < 0)
    ):
        yield "learn more slowly", f"--lr {rate / 4:.1g}"
        return
    if train.max_steps is None:
        yield "train longer", f"--epochs {math.ceil(2 * train.epochs)}"
    else:
        yield "train longer", f"--max-steps {2 * train.max_steps}"
