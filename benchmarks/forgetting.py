"""What a weaker adapter keeps and loses: validation loss and forgetting at several strengths of a run's adapter.

    slimtune train examples/devils-dictionary.yaml --max-steps 48 --lr 3e-3 --set train.eval_steps=6 --out RUN
    python benchmarks/forgetting.py RUN

Forgetting is the rise of the loss on the kind of the built-in general text where it rises most, as
train.forgetting_budget measures it. With that setting `train` prints it for each checkpoint, too.
"""

import argparse
from typing import Any

from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.forgetting_budget import group_row_numbers_by_kind, max_loss_increase
from slimtune.core.training.loss import build_run_collator
from slimtune.core.training.trained_model import load_run
from slimtune.evaluation.general_text import load_general_text
from slimtune.evaluation.row_scores import score_supervised_rows
from slimtune.extras.adapter_strength import AdapterTensorInterpolator

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    trained = load_run(parser.parse_args().run)
    validation = tokenize_recipe_datasets(trained.recipe, trained.base.tokenizer).validation
    general = load_general_text(None).choose_rows(trained.recipe, trained.base.tokenizer, trained.model, print)
    kinds = group_row_numbers_by_kind(general)
    collator = build_run_collator(trained.recipe.train, trained.model, trained.base.tokenizer, 512)
    strength, base = AdapterTensorInterpolator(trained.model, "default"), dict[str, float]()

    def measure(rows: Any) -> float:
        scores = score_supervised_rows(trained.model, rows, collator)
        return sum(s.nats for s in scores) / sum(s.tokens for s in scores)

    for s in STRENGTHS:
        strength.set(s)
        after = {kind: measure([general[i] for i in numbers]) for kind, numbers in kinds.items()}
        base, loss = base or after, measure(validation)
        print(
            f"strength {s:5.3f}   forgetting {max_loss_increase(after, base):+.4f}   validation loss {loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
