"""The runs of a comparison: every candidate with every seed.

    DIR/settings.json          what is compared: the same command resumes it, a different one is refused
    DIR/cells/lora-42.yaml     the recipe of one run; lora-42/ is its run folder, lora-42.log its output
    DIR/tune/…                 the search for learning rates
    DIR/compare.json, table.md, compare.svg

All runs take the same number of optimizer steps over the same number of rows. A seed determines the order of the rows,
so runs with the same seed train on the same rows in the same order.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.config import Recipe
from ..core.config.objective_registry import load_objective_class
from ..core.config.schema import ModelSettings
from ..core.data.example_lengths import ExampleLength
from ..core.foundation.files import parse_json, read_regular_file
from ..core.models.base_config import get_hidden_size, load_base_config
from ..core.models.dtype import pick_device
from ..core.training.base_model import load_base_tokenizer
from ..core.training.datasets import load_eval_dataset_and_stats, load_training_datasets
from ..core.training.default_learning_rate import fill_in_learning_rate
from ..core.training.loss import TOKENS_ON_CPU, TOKENS_ON_GPU
from ..core.training.run_dir import RunDir
from ..errors import RecipeError, UsageError
from ..extras.row_digest import hash_rows
from ..extras.row_files import list_missing_data_file_errors
from .candidates import ComparisonCandidate


@dataclass(frozen=True)
class ComparisonGrid:
    """What is compared."""

    tree: Mapping[str, Any]  # the recipe as a plain tree, without its method
    candidates: tuple[ComparisonCandidate, ...]
    seeds: tuple[int, ...]  # one run of each candidate per seed
    tokens: int | None  # the requested budget in trained tokens; None: the recipe's own length
    steps: int  # optimizer steps of one run
    trials_per_candidate: int  # learning rates tried for each candidate; 0: none
    token_counts_by_example: tuple[int, ...]  # tokens of each training example: of a row, or of both answers of a pair
    output_dir: Path
    example_lengths: tuple[ExampleLength, ...] = ()  # of the training examples, to plan for
    excluded: Mapping[str, str] = field(default_factory=dict)  # why candidates from "all" are left out, by label
    at_once: int = 1  # runs of a candidate that train at the same time in one process
    allow_faulty_rows: bool = False  # train on rows that the data report finds faulty
    digests: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the training, validation and test rows

    def build_recipe(self, candidate: ComparisonCandidate, seed: int, output_dir: Path, **train: Any) -> Recipe:
        """Return the recipe of one run or one trial; `train` replaces common fields of the recipe's section."""
        tree: dict[str, Any] = copy.deepcopy(dict(self.tree))
        section = dict(tree.get("train") or {})
        section.pop("epochs", None)
        # Every run spends its whole budget, so nothing stops early.
        section = {
            "save_steps": max(1, math.ceil(self.steps / 2)),
            **section,
            "early_stopping_patience": None,
            "learning_rate": candidate.learning_rate,
            "seed": seed,
            "max_steps": self.steps,
            "save_total_limit": 1,
            **train,
        }
        if section.get("max_tokens_per_micro_batch", "auto") == "auto":
            # "auto" would depend on the memory that happens to be free, and so would the measured peak.
            model = tree.get("model")
            device = pick_device(model.get("device", "auto") if isinstance(model, Mapping) else "auto")
            section["max_tokens_per_micro_batch"] = TOKENS_ON_GPU if device.type == "cuda" else TOKENS_ON_CPU
        method = {"name": candidate.method, **candidate.settings}
        tree |= {"train": section, "output_dir": str(output_dir.absolute()), "method": method}
        if candidate.task is not None:
            tree["task"] = candidate.task
        return Recipe.from_dict(tree, f"the recipe of {candidate.label}")

    def cell_recipe(self, candidate: ComparisonCandidate, seed: int) -> Recipe:
        """Return the recipe of a run of the grid.

        The run skips validation if it would validate only once, at its end: then there is no checkpoint to choose.
        """
        recipe = self.build_recipe(candidate, seed, self.run_dir(candidate, seed).path)
        train, data = recipe.train, recipe.data
        steps_per_epoch = math.ceil(len(self.token_counts_by_example) / train.rows_per_step)
        if data.validation is None or train.eval_steps is not None or self.steps > steps_per_epoch:
            return recipe
        data = replace(data, validation=None, validation_fraction=0.0)
        return replace(recipe, data=data)

    def run_dir(self, candidate: ComparisonCandidate, seed: int) -> RunDir:
        """Return the run folder of a candidate with a seed."""
        return RunDir(self.output_dir / "cells" / f"{candidate.label}-{seed}")

    def is_done(self, candidate: ComparisonCandidate, seed: int) -> bool:
        """Return whether the run was trained and measured; the scores file is written last, and may be damaged."""
        try:
            return isinstance(parse_json(read_regular_file(self.run_dir(candidate, seed).scores_file("test"))), list)
        except (OSError, ValueError):
            return False

    def settings(self) -> dict[str, Any]:
        """Return what must not change when the comparison is resumed."""
        recipe = self.build_recipe(self.candidates[0], self.seeds[0], self.output_dir).to_dict()
        return {
            "model": recipe["model"],
            "data": recipe["data"],
            "train": {k: v for k, v in recipe["train"].items() if k not in ("learning_rate", "seed")},
            "tokens": self.tokens,
            "trials": self.trials_per_candidate,
            "rows (SHA-256)": self.digests,
            "methods": {c.label: c.to_dict() for c in self.candidates},
            **({"at_once": self.at_once} if self.at_once > 1 else {}),  # it changes what memory is measured
        }


def build_comparison_grid(
    tree: Mapping[str, Any],
    candidates: Sequence[ComparisonCandidate],
    *,
    seed_count: int,
    tokens_per_run: int | None,
    trials: int,
    output_dir: Path,
    at_once: int = 1,
    allow_faulty_rows: bool = False,
) -> ComparisonGrid:
    """Read the rows and return the runs with their number of steps.

    Args:
        tree: the recipe as a plain tree in long form, with absolute paths.
        candidates: the methods to compare.
        seed_count: number of seeds; the first is the recipe's, the others follow it.
        tokens_per_run: trained tokens of a run, on average; None: as long as the recipe says.
        trials, output_dir, at_once, allow_faulty_rows: see `ComparisonGrid`.
    """
    # The plan is for the longest examples: both answers of a pair, where an objective learns both.
    tasks = [c.task for c in candidates if c.task is not None]
    longest = sorted(tasks, key=lambda task: load_objective_class(task["name"]).rows_per_example)[-1:]
    planned_tree = {**tree, **({"task": longest[0]} if longest else {}), "output_dir": str(output_dir)}
    recipe = Recipe.from_dict(planned_tree, extra_checks=list_missing_data_file_errors)
    grid = ComparisonGrid(
        tree={k: v for k, v in tree.items() if k != "method"},
        candidates=tuple(candidates),
        seeds=tuple(recipe.train.seed + i for i in range(seed_count)),
        tokens=tokens_per_run,
        steps=1,
        trials_per_candidate=trials,
        token_counts_by_example=(),
        output_dir=output_dir,
        at_once=at_once,
        allow_faulty_rows=allow_faulty_rows,
    )
    excluded: dict[str, str] = {}
    for candidate in candidates:  # invalid settings are reported before any row is read
        try:
            grid.build_recipe(candidate, recipe.train.seed, output_dir)
        except RecipeError as e:
            if not candidate.from_all:
                raise
            excluded[candidate.label] = " ".join(e.message.split())
    test_file = recipe.data.test
    if test_file is None and recipe.data.test_fraction == 0:
        expected = "a file of rows, data.test, or a share of the training rows, data.test_fraction"
        raise UsageError("the recipe names no test rows to compare the methods on", expected)
    tokenizer = load_base_tokenizer(recipe.model, recipe.data.chat_template)
    test_rows = (
        None
        if test_file is None
        else load_eval_dataset_and_stats(test_file, recipe.data, recipe.objective(), tokenizer)[0]
    )
    rows = load_training_datasets(recipe, allow_faulty_rows)
    test_rows = rows.test if test_rows is None else test_rows
    if len(test_rows) < 2:
        source = test_file or "data.test_fraction"
        raise UsageError(f"{source} leaves {len(test_rows)} rows to compare methods on", "two rows or more")
    if trials and not rows.validation:
        message = "there are no validation rows to search learning rates on"
        raise UsageError(message, "data.validation", "or leave out --tune")
    lengths = tuple(rows.train.lengths.tolist())
    grid = dataclasses.replace(
        grid, steps=_count_steps_for_tokens(recipe, lengths, tokens_per_run), token_counts_by_example=lengths
    )
    hidden_size = load_base_hidden_size(recipe.model)

    def with_rate(candidate: ComparisonCandidate) -> ComparisonCandidate:
        built = grid.build_recipe(candidate, recipe.train.seed, output_dir)
        filled = fill_in_learning_rate(built, len(lengths), hidden_size)
        return dataclasses.replace(candidate, learning_rate=filled.train.learning_rate)

    return dataclasses.replace(
        grid,
        candidates=tuple(with_rate(c) for c in candidates if c.label not in excluded),
        excluded=excluded,
        example_lengths=tuple(rows.train.example_lengths),
        digests={
            "train": hash_rows(rows.train),
            "validation": hash_rows(rows.validation),
            "test": hash_rows(test_rows),
        },
    )


def _count_steps_for_tokens(recipe: Recipe, lengths: Sequence[int], tokens: int | None) -> int:
    if tokens is None:
        return recipe.train.count_steps(len(lengths))
    rows_per_step = recipe.train.rows_per_step
    tokens_per_step = sum(lengths) / len(lengths) * min(rows_per_step, len(lengths))
    if tokens < tokens_per_step:
        step = f"{rows_per_step} rows have {tokens_per_step:.0f} tokens on average"
        hint = "or a smaller --set train.batch_size"
        raise UsageError(
            f"--tokens {tokens} is less than one step: {step}", f"{math.ceil(tokens_per_step)} or more", hint
        )
    return math.floor(tokens / tokens_per_step)


def load_base_hidden_size(model_settings: ModelSettings) -> int:
    """Return the width of a base's hidden states by its config, no weights."""
    config = load_base_config(
        model_settings.name, trust_remote_code=model_settings.trust_remote_code, revision=model_settings.revision
    ).config
    return get_hidden_size(config)
