"""Held-out loss and perplexity, base against tuned.

Every row is scored twice by one model in one arrangement of rows, with the adapter and without it, so that nothing
but the adapter makes the difference. What the numbers are stands in statistics.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..build import Loaded, adapter_folder, collator_of, held_out, load_run, rows_of
from ..data.collate import Example
from ..data.read import read_rows
from ..data.rows import RowReport
from ..errors import AdapterError, ModelError, SlimtuneError, UsageError, listed, nearest
from ..recipe import Recipe
from ..runs import RunFolder, json_text, write_atomic
from ..step import score
from .statistics import paired, perplexity

SPLITS = ("test", "validation")


def evaluate(
    run: Path, *, split: str = "test", data: Path | None = None, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Measure held-out loss, base against tuned; a run folder keeps the result as `eval-<split>.json`.

    Beside it lies `eval-<split>-rows.json`: of each row its `line` in the file, `tokens` (supervised), and the nats
    that `base` and `tuned` spend on them.

    Args:
        run: a run folder, or an adapter folder (then `data` is needed).
        split: the recipe's rows to measure on: "test" or "validation".
        data: JSONL file to measure on, in place of a split; kept as `eval-data-<name>.json`.
        bootstrap: draws for the interval.
        seed: of the draws.

    Returns:
        `run`, `split` (None where `data` is given), `data` (the file), `rows`, `tokens` (supervised), `base_loss`,
        `tuned_loss`, `gain` (base - tuned; all in nats per token), `gain_ci95` ([low, high]), `base_perplexity`,
        `tuned_perplexity`, `rows_better`, `dropped` and `truncated` (rows of the file), `dtype`, `quant` (what the
        base was held in, None: in `dtype`), `seconds`.

    Raises:
        UsageError: no such run, no such rows, or no draws.
        DataError: the rows are faulty.
        AdapterError: the adapter does not fit, or gives losses that are no numbers.
    """
    began = time.perf_counter()
    run = Path(run)
    if bootstrap < 1:
        raise UsageError(f"bootstrap is {bootstrap}", "one draw or more", "leave it out for 2000")
    folder = None if adapter_folder(run) == run else RunFolder.open(run)
    path = _rows_file(folder, run, split, data)
    if path is not None:
        read_rows(path)  # a fault of the file is said before the model is loaded
    loaded = load_run(run)
    recipe = loaded.recipe or _stand_in(loaded, run, path)
    examples, report = _rows(recipe, loaded, path)
    longest = max(len(e["input_ids"]) for e in examples)
    collator = collator_of(recipe, loaded.model, loaded.base.tokenizer, longest)
    tuned = score(loaded.model, examples, collator)
    with loaded.model.disable_adapter():
        base = score(loaded.model, examples, collator)
    _require_numbers(base, examples, path, ModelError, "base")
    _require_numbers(tuned, examples, path, AdapterError, "tuned model")
    tokens = [n for _, n in base]
    found = paired([s for s, _ in base], [s for s, _ in tuned], tokens, draws=bootstrap, seed=seed)
    result = {
        "run": str(run),
        "split": None if data is not None else split,
        "data": str(path or recipe.data.train),
        "rows": len(examples),
        "tokens": sum(tokens),
        "base_loss": found.base_loss,
        "tuned_loss": found.tuned_loss,
        "gain": found.gain,
        "gain_ci95": [found.low, found.high],
        "base_perplexity": perplexity(found.base_loss),
        "tuned_perplexity": perplexity(found.tuned_loss),
        "rows_better": found.rows_better,
        "dropped": report.dropped,
        "truncated": report.truncated,
        "dtype": str(loaded.base.dtype).removeprefix("torch."),
        "quant": loaded.base.quant,
        "seconds": round(time.perf_counter() - began, 3),
    }
    if folder is not None:
        name = split if data is None else f"data-{data.stem}"
        write_atomic(folder.path / f"eval-{name}.json", json_text(result, indent=2) + "\n")
        each = [
            {"line": e["line"], "tokens": n, "base": b, "tuned": u}
            for e, (b, n), (u, _) in zip(examples, base, tuned, strict=True)
        ]
        write_atomic(folder.path / f"eval-{name}-rows.json", json_text(each) + "\n")
    return result


def _rows_file(folder: RunFolder | None, run: Path, split: str, data: Path | None) -> Path | None:
    """Return the file to measure on; None: the rows that training set aside from its own file."""
    if data is not None:
        return Path(data)
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}{nearest(split, SPLITS)}", f"one of {listed(SPLITS)}")
    if folder is None:
        raise UsageError(
            f"{run} is an adapter folder without a recipe, so no held-out rows are known",
            "a JSONL file of rows that it was not trained on",
            "--data FILE",
        )
    settings = folder.recipe().data
    path = settings.test if split == "test" else settings.validation
    if path is None and split == "validation" and settings.validation_fraction > 0:
        return None
    if path is None:
        there = split == "test" and (settings.validation is not None or settings.validation_fraction > 0)
        raise UsageError(
            f"the recipe of {run} names no {split} rows",
            f"data.{split} in {folder.recipe_file}, or a file",
            f"--data FILE{', or --split validation' if there else ''}",
        )
    return path


def _stand_in(loaded: Loaded, run: Path, path: Path | None) -> Recipe:
    """Return a recipe's defaults for an adapter that has none; unpacked, which every architecture understands."""
    return Recipe.from_dict(
        {
            "model": loaded.base.source.spec,
            "data": {"train": str(path)},
            "train": {"packing": False},
            "out": str(run),
        }
    )


def _rows(recipe: Recipe, loaded: Loaded, path: Path | None) -> tuple[list[Example], RowReport]:
    if path is not None:
        return held_out(recipe, loaded.base.tokenizer, path)
    rows = rows_of(recipe, loaded.base.tokenizer)
    if not rows.validation:
        raise UsageError(
            f"training set no rows aside: {recipe.data.validation_fraction} of {len(rows.train)} rows is none",
            "data.validation in the recipe, or a file",
            "--data FILE",
        )
    return rows.validation, rows.train_report


def _require_numbers(
    scores: Sequence[tuple[float, int]],
    examples: Sequence[Example],
    path: Path | None,
    kind: type[SlimtuneError],
    who: str,
) -> None:
    lines = [e["line"] for e, (nats, _) in zip(examples, scores, strict=True) if not math.isfinite(nats)]
    if lines:
        raise kind(
            f"the {who}'s loss is no number on {len(lines)} of {len(scores)} rows "
            f"(lines {listed(lines)} of {path or 'the training file'})",
            "finite losses",
            "evaluate in float32, or take an older checkpoint",
        )
