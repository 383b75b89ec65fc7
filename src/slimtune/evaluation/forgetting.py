"""Forgetting: the change of the loss on general text that the adapter never saw.

    change = Σ (tuned_i - base_i) / Σ tokens_i          nats per token over pieces i; above 0: something was lost

The budget is exceeded if the whole interval of the change is above it.
"""

from collections.abc import Callable, Sequence

from ..core.data.collator import Example
from ..core.training.forgetting_budget import group_row_numbers_by_kind
from .eval_result import ForgettingMeasures, LossChange
from .row_scores import RowScore
from .statistics import paired_bootstrap


def measure_forgetting(
    text_name: str,
    examples: Sequence[Example],
    score_both: Callable[[Sequence[Example]], tuple[list[RowScore], list[RowScore]]],
    budget_in_nats: float,
    **bootstrap: int,
) -> ForgettingMeasures:
    """Compare the losses of base and tuned model on the pieces of a general text.

    `text_name` names it, `score_both` scores rows by both models, `budget_in_nats` is per token, `bootstrap` is
    `draws` and `seed`.
    """
    base, tuned = score_both(examples)

    def compare(rows: Sequence[int]) -> LossChange:
        tokens = [base[i].tokens for i in rows]
        # The bootstrap subtracts its second argument from its first: tuned - base.
        found = paired_bootstrap([tuned[i].nats for i in rows], [base[i].nats for i in rows], tokens, **bootstrap)
        return LossChange(
            tokens=sum(tokens),
            base_loss=found.second.value,
            tuned_loss=found.first.value,
            change=found.difference,
        )

    whole = compare(range(len(examples)))
    kinds = {kind: compare(numbers) for kind, numbers in group_row_numbers_by_kind(examples).items()}
    return ForgettingMeasures(
        **vars(whole), text=text_name, budget=budget_in_nats, within=whole.change.low <= budget_in_nats, kinds=kinds
    )
