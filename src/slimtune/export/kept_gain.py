"""Measure how much of what training gained is left in a model that was rounded to few bits, in the engine.

    gain = L(base) - L(tuned)        kept = (L(base) - L(shipped)) / gain

L is the loss on rows that the run held out: in nats per supervised token, or, of preference pairs, the objective's loss
per pair, whose reference is the unrounded base. Base and tuned model are as they were trained, unrounded, in
transformers; the shipped file is asked in its engine. So kept counts everything that rounding costs: also what it takes
from the base, whose own loss in the same engine and precision is given beside it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core.config import Recipe
from ..core.data.chat_template import TokenizedRow
from ..core.data.tokenize import tokenize_rows_with_errors
from ..core.data.tokenized_dataset import IGNORE_INDEX, list_tokens_and_labels_by_row
from ..core.foundation.progress_bars import track_progress
from ..core.training.datasets import tokenize_recipe_datasets
from ..core.training.objective import open_rows_for_objective
from ..core.training.trained_model import TrainedModel
from ..errors import SlimtuneError
from ..evaluation.statistics import bootstrap_share, paired_bootstrap
from ..extras.training_fingerprint import require_rows_unchanged_since_training
from ..generation.inference_engines import TransformersInferenceEngine
from ..objectives.pair_objective import PairObjective
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


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that a run did not learn; their loss says how much of its gain is left."""

    texts: list[TokenizedRow]
    """The rows; of pairs the chosen answer of each, with its prompt, and then the rejected one."""
    pair_objective: PairObjective | None = None
    """What computes the losses of pairs."""

    @property
    def tokens(self) -> list[int]:
        """Supervised tokens of each text."""
        return [sum(text.supervised[1:]) for text in self.texts]

    @property
    def items(self) -> list[int]:
        """How many items each row's loss is a sum over: its supervised tokens, or one pair."""
        return self.tokens if self.pair_objective is None else [1] * (len(self.texts) // 2)

    def compute_losses(self, nats: Sequence[float], base_nats: Sequence[float]) -> list[float]:
        """Return each row's loss, from what a model and the base spend on each text's supervised tokens."""
        if self.pair_objective is None:
            return list(nats)
        spent, reference, tokens = (
            torch.tensor(values, dtype=torch.float64).view(-1, 2) for values in (nats, base_nats, self.tokens)
        )
        losses: list[float] = self.pair_objective.pair_losses(-spent, tokens, -reference)[0].tolist()
        return losses


def measure_kept_gain(
    loaded: TrainedModel,
    held_out_rows: HeldOutRows,
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
    texts = held_out_rows.texts
    longest = max(len(text.input_ids) for text in texts) + 1
    unrounded = measure_unrounded_nats(loaded, texts)
    with closing(open_shipped(longest)) as engine:
        shipped = sum_supervised_nats(engine, texts, f"rows for {engine.name}")
    with closing(open_rounded_base(longest)) as engine:
        rounded_base = sum_supervised_nats(engine, texts, f"rows for the base in {engine.name}")
    return estimate_kept_gain(held_out_rows, unrounded, shipped, rounded_base)


@dataclass(frozen=True)
class UnroundedNats:
    """-log p of each text's supervised tokens, by the base and by base and adapter as they were trained."""

    base: list[float]
    tuned: list[float]


def measure_unrounded_nats(loaded: TrainedModel, texts: Sequence[TokenizedRow]) -> UnroundedNats:
    """Return what base and tuned model spend on each text, unrounded."""
    model: Any = loaded.model
    trained = TransformersInferenceEngine("trained adapter", model, loaded.base.tokenizer)
    tuned = sum_supervised_nats(trained, texts, "rows for the trained adapter")
    with model.disable_adapter():
        base = sum_supervised_nats(trained, texts, "rows for the base")
    return UnroundedNats(base, tuned)


def estimate_kept_gain(
    rows: HeldOutRows, unrounded: UnroundedNats, shipped: Sequence[float], rounded_base: Sequence[float]
) -> KeptGain:
    """Return the share of the gain that is left, from what the engine spends on each text with and without adapter."""
    base, tuned, rounded, left = (
        rows.compute_losses(nats, unrounded.base) for nats in (unrounded.base, unrounded.tuned, rounded_base, shipped)
    )
    total = sum(rows.items)
    measured = KeptGain(
        rows=len(base),
        tokens=sum(rows.tokens),
        base_loss=sum(base) / total,
        tuned_loss=sum(tuned) / total,
        rounded_base_loss=sum(rounded) / total,
        shipped_loss=sum(left) / total,
    )
    if paired_bootstrap(base, tuned, rows.items).difference.low <= 0:
        return replace(measured, reason=f"not measured: no gain is certain on {len(base)} held-out rows")
    share = bootstrap_share(
        [b - s for b, s in zip(base, left, strict=True)], [b - t for b, t in zip(base, tuned, strict=True)]
    )
    return replace(measured, share=share.value, share_ci95=share.ci95)


def list_held_out_rows(loaded: TrainedModel, rows_file: Path | None) -> HeldOutRows | str:
    """Return the first held-out rows of a run, or of a file, tokenized as in training; or why there are none."""
    if (recipe := loaded.recipe) is None:
        return "an adapter without its run names no held-out rows"
    objective = recipe.objective()
    pairs = objective if isinstance(objective, PairObjective) else None
    if recipe.task.name != "sft" and pairs is None:
        return f"no loss of {recipe.task.name} is computed in an engine"
    files = (recipe.data.test, recipe.data.validation) if rows_file is None else (rows_file,)
    file = next((f for f in files if f is not None and f.exists()), None)
    try:
        tokenizer = loaded.base.tokenizer
        found = _read_rows_set_aside(loaded, recipe) if file is None else _read_rows_of_file(file, recipe, tokenizer)
        rows = [[answers[0], answers[-1]] if pairs is not None else answers[:1] for answers in found]
    except SlimtuneError as error:
        return error.message
    chosen: list[TokenizedRow] = []
    left = MAX_TOKENS
    for texts in rows:
        if left > 0 and all(any(text.supervised[1:]) for text in texts):
            left -= sum(sum(text.supervised[1:]) for text in texts)
            chosen += texts
    if not chosen:
        return f"{file or 'what the run set aside'} has no row with a supervised token"
    return HeldOutRows(chosen, pairs)


def _read_rows_of_file(file: Path, recipe: Recipe, tokenizer: Any) -> Iterator[list[TokenizedRow]]:
    """Yield the first rows of a file as the run tokenizes them, or the answers of each, the best one first."""
    opened = open_rows_for_objective(file, recipe.data, recipe.objective())
    rows = list(itertools.islice(opened.require_valid_rows(), MAX_ROWS))
    for row in tokenize_rows_with_errors(rows, tokenizer, train_on=recipe.data.train_on):
        if isinstance(row, TokenizedRow):
            yield [text.truncate(recipe.data.max_seq_len or len(text.input_ids)) for text in row.split()]


def _read_rows_set_aside(loaded: TrainedModel, recipe: Recipe) -> Iterator[list[TokenizedRow]]:
    """Yield the first rows that the run set aside: for the test, else for validation; none if it set none aside.

    Raises:
        AdapterError: the file of rows has changed, so that some may be rows that the run was trained on.
    """
    datasets = tokenize_recipe_datasets(recipe, loaded.base.tokenizer)
    require_rows_unchanged_since_training(loaded.adapter_folder, datasets)
    for example in itertools.islice(datasets.test or datasets.validation, MAX_ROWS):
        texts = list_tokens_and_labels_by_row(example)
        yield [TokenizedRow(ids, [label != IGNORE_INDEX for label in labels]) for ids, labels in texts]


def sum_supervised_nats(engine: TokenScorer, texts: Sequence[TokenizedRow], what: str) -> list[float]:
    """Return -log p of each text's supervised tokens, summed."""
    return [
        -engine.score_tokens(text.input_ids, [i for i, on in enumerate(text.supervised) if on and i]).sum().item()
        for text in track_progress(texts, what)
    ]
