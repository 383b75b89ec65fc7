"""Measure how much of what training gained is left in a model that was rounded to few bits, in the engine.

    gain = L(base) - L(tuned)        kept = (L(base) - L(shipped)) / gain

L is the loss on rows that the run held out, in nats per supervised token. Base and tuned model are as they were
trained, unrounded, in transformers; the shipped file is asked in its engine. So kept counts everything that rounding
costs: also what it takes from the base, whose own loss in the same engine and precision is given beside it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..core.config import Recipe
from ..core.data.chat_template import TokenizedRow
from ..core.data.tokenize import tokenize_rows_with_errors
from ..core.data.tokenized_dataset import IGNORE_INDEX
from ..core.foundation.progress_bars import track_progress
from ..core.training.datasets import tokenize_recipe_datasets
from ..core.training.objective import open_rows_for_objective
from ..core.training.trained_model import TrainedModel
from ..errors import SlimtuneError
from ..evaluation.statistics import bootstrap_share, paired_bootstrap
from ..extras.training_fingerprint import require_rows_unchanged_since_training
from ..generation.inference_engines import TransformersInferenceEngine
from .export_results import KeptGain

MAX_ROWS, MAX_TOKENS = 60, 3000
"""Held-out rows, and their supervised tokens in total."""


class TokenScorer(Protocol):
    """What gives log-probabilities of the tokens of a text."""

    name: str

    def score_tokens(self, ids: Sequence[int], indices: Sequence[int]) -> Any:
        """Return the log-probabilities of a text's tokens at some indices, 1 or more, ascending, as a tensor."""

    def close(self) -> None:
        """Release the model."""


OpenScorer = Callable[[int], TokenScorer]
"""Opens a scorer for texts of up to so many tokens."""


def measure_kept_gain(
    loaded: TrainedModel,
    held_out_rows: Sequence[TokenizedRow],
    open_shipped: OpenScorer,
    open_rounded_base: OpenScorer,
) -> KeptGain:
    """Return the share of the held-out gain that is left in an engine; without a share it says why there is none.

    Args:
        loaded: base and adapter as they were trained.
        held_out_rows: of `list_held_out_rows`.
        open_shipped: opens what is shipped.
        open_rounded_base: opens the base without an adapter in the same precision.
    """
    longest = max(len(row.input_ids) for row in held_out_rows) + 1
    unrounded = measure_unrounded_nats(loaded, held_out_rows)
    with closing(open_shipped(longest)) as engine:
        shipped = sum_supervised_nats(engine, held_out_rows, f"rows for {engine.name}")
    with closing(open_rounded_base(longest)) as engine:
        rounded_base = sum_supervised_nats(engine, held_out_rows, f"rows for the base in {engine.name}")
    return estimate_kept_gain(unrounded, shipped, rounded_base)


@dataclass(frozen=True)
class UnroundedNats:
    """-log p of each held-out row's supervised tokens, by the base and by base and adapter as they were trained."""

    tokens: list[int]
    base: list[float]
    tuned: list[float]


def measure_unrounded_nats(loaded: TrainedModel, rows: Sequence[TokenizedRow]) -> UnroundedNats:
    """Return what base and tuned model spend on each row, unrounded."""
    model: Any = loaded.model
    trained = TransformersInferenceEngine("trained adapter", model, loaded.base.tokenizer)
    tuned = sum_supervised_nats(trained, rows, "rows for the trained adapter")
    with model.disable_adapter():
        base = sum_supervised_nats(trained, rows, "rows for the base")
    return UnroundedNats([sum(row.supervised[1:]) for row in rows], base, tuned)


def estimate_kept_gain(unrounded: UnroundedNats, shipped: Sequence[float], rounded_base: Sequence[float]) -> KeptGain:
    """Return the share of the gain that is left, from what the engine spends on each row with and without adapter."""
    base, tuned, total = unrounded.base, unrounded.tuned, sum(unrounded.tokens)
    measured = KeptGain(
        rows=len(base),
        tokens=total,
        base_loss=sum(base) / total,
        tuned_loss=sum(tuned) / total,
        rounded_base_loss=sum(rounded_base) / total,
        shipped_loss=sum(shipped) / total,
    )
    if paired_bootstrap(base, tuned, unrounded.tokens).difference.low <= 0:
        return replace(measured, reason=f"not measured: no gain is certain on {len(base)} held-out rows")
    share = bootstrap_share(
        [b - s for b, s in zip(base, shipped, strict=True)], [b - t for b, t in zip(base, tuned, strict=True)]
    )
    return replace(measured, share=share.value, share_ci95=share.ci95)


def list_held_out_rows(loaded: TrainedModel, rows_file: Path | None) -> list[TokenizedRow] | str:
    """Return the first held-out rows of a run, or of a file, tokenized as in training; or why there are none."""
    if (recipe := loaded.recipe) is None:
        return "an adapter without its run names no held-out rows"
    if recipe.task.name != "sft":
        return f"no loss of {recipe.task.name} is computed in an engine"
    files = (recipe.data.test, recipe.data.validation) if rows_file is None else (rows_file,)
    file = next((f for f in files if f is not None and f.exists()), None)
    try:
        tokenizer = loaded.base.tokenizer
        found = _read_rows_set_aside(loaded, recipe) if file is None else _read_rows_of_file(file, recipe, tokenizer)
        rows = list(found)
    except SlimtuneError as error:
        return error.message
    chosen, left = [], MAX_TOKENS
    for row in rows:
        if left > 0 and any(row.supervised[1:]):
            left -= sum(row.supervised[1:])
            chosen.append(row)
    return chosen or f"{file or 'what the run set aside'} has no row with a supervised token"


def _read_rows_of_file(file: Path, recipe: Recipe, tokenizer: Any) -> Iterator[TokenizedRow]:
    """Yield the first rows of a file as the run tokenizes them."""
    opened = open_rows_for_objective(file, recipe.data, recipe.objective())
    rows = list(itertools.islice(opened.require_valid_rows(), MAX_ROWS))
    for row in tokenize_rows_with_errors(rows, tokenizer, train_on=recipe.data.train_on):
        if isinstance(row, TokenizedRow):
            yield row.split()[0].truncate(recipe.data.max_seq_len or len(row.input_ids))


def _read_rows_set_aside(loaded: TrainedModel, recipe: Recipe) -> Iterator[TokenizedRow]:
    """Yield the first rows that the run set aside: for the test, else for validation; none if it set none aside.

    Raises:
        AdapterError: the file of rows has changed, so that some may be rows that the run was trained on.
    """
    datasets = tokenize_recipe_datasets(recipe, loaded.base.tokenizer)
    require_rows_unchanged_since_training(loaded.adapter_folder, datasets)
    for example in itertools.islice(datasets.test or datasets.validation, MAX_ROWS):
        yield TokenizedRow(example["input_ids"], [label != IGNORE_INDEX for label in example["labels"]])


def sum_supervised_nats(engine: TokenScorer, rows: Sequence[TokenizedRow], what: str) -> list[float]:
    """Return -log p of each row's supervised tokens, summed."""
    return [
        -engine.score_tokens(row.input_ids, [i for i, on in enumerate(row.supervised) if on and i]).sum().item()
        for row in track_progress(rows, what)
    ]
