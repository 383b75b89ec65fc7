"""What a weaker adapter keeps and loses: validation loss and forgetting at several strengths of a run's adapter.

    slimtune train examples/devils-dictionary.yaml --max-steps 48 --lr 3e-3 --set train.eval_steps=6 --out RUN
    python benchmarks/forgetting.py RUN

Forgetting is the rise of the loss on the kind of the built-in general text where it rises most, as
train.forgetting_budget measures it. With that setting `train` prints it for each checkpoint, too.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.forgetting_budget import group_row_numbers_by_kind, max_loss_increase
from slimtune.core.training.loss import build_run_collator
from slimtune.core.training.trained_model import TrainedModel, load_run
from slimtune.evaluation.general_text import load_general_text
from slimtune.evaluation.row_scores import score_supervised_rows
from slimtune.extras.adapter_strength import AdapterTensorInterpolator

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)


class StrengthResult(NamedTuple):
    """What an adapter does at a strength: losses in nats per token, accuracy as a share of tokens."""

    strength: float
    forgetting: float
    loss: float
    accuracy: float


def measure_strengths(
    trained: TrainedModel, rows: Sequence[Any], strengths: Sequence[float] = STRENGTHS
) -> Iterator[StrengthResult]:
    """Yield forgetting, and loss and accuracy of rows, at each strength, of which the first must be 0."""
    assert trained.recipe is not None
    general = load_general_text(None).choose_rows(trained.recipe, trained.base.tokenizer, trained.model, print)
    kinds = group_row_numbers_by_kind(general)
    collator = build_run_collator(trained.recipe.train, trained.model, trained.base.tokenizer, 512)
    interpolator, base = AdapterTensorInterpolator(trained.model, "default"), dict[str, float]()

    def measure(examples: Any) -> tuple[float, float]:
        scores = score_supervised_rows(trained.model, examples, collator)
        tokens = sum(s.tokens for s in scores)
        return sum(s.nats for s in scores) / tokens, sum(s.hits for s in scores) / tokens

    for strength in strengths:
        interpolator.set(strength)
        after = {kind: measure([general[i] for i in numbers])[0] for kind, numbers in kinds.items()}
        base = base or after
        yield StrengthResult(strength, max_loss_increase(after, base), *measure(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    trained = load_run(parser.parse_args().run)
    assert trained.recipe is not None
    for s in measure_strengths(trained, tokenize_recipe_datasets(trained.recipe, trained.base.tokenizer).validation):
        print(
            f"strength {s.strength:5.3f}   forgetting {s.forgetting:+.4f}   validation loss {s.loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
