"""The cells of a comparison: every entry with every seed, as the recipe that trains it, and the folder they lie in.

    DIR/settings.json          what is compared: the same command goes on, another one is refused
    DIR/cells/lora-42.yaml     a cell's recipe      lora-42/   its run folder      lora-42.log   what it said
    DIR/tune/…                 the search for learning rates
    DIR/compare.json, table.md, compare.svg

All cells take as many optimizer steps of as many rows. A seed decides the order of the rows, so the cells of one seed
learn from the same rows in the same order.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import Recipe
from ..data.validation.summary import raise_if_invalid
from ..errors import DataError, RecipeError, UsageError, format_names
from ..models.dtype import pick_device
from ..run_dir import RunDir, to_json, write_atomic
from ..setup import load_datasets, load_eval_dataset, load_tokenizer_from_recipe
from ..train_step.loss import TOKENS_ON_CPU, TOKENS_ON_GPU
from .candidates import Candidate

SETTINGS = "settings.json"
TRIAL = 0.5
"""Share of a cell's steps that a trial of a learning rate takes."""


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Args:
        tree: the recipe's, without a method.
        entries: the methods.
        seeds: of the cells.
        tokens: the budget asked for; None: as long as the recipe says.
        steps: optimizer steps of a cell.
        trials: learning rates tried for each entry; 0: none.
        lengths: tokens of every training row.
        out: the folder of it all.
        unfit: why methods that came by "all" are left out, by label.
        force: train on data that a survey finds faulty.
        digests: SHA-256 of the rows to train on, to validate and to test on.
    """

    tree: Mapping[str, Any]
    entries: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    tokens: int | None
    steps: int
    trials: int
    lengths: tuple[int, ...]
    out: Path
    unfit: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    digests: Mapping[str, str] = field(default_factory=dict)

    def recipe(self, entry: Candidate, seed: int, out: Path, **train: Any) -> Recipe:
        """Return the recipe of a cell or a trial.

        Args:
            entry: whose settings and rate it takes; of "full" the recipe's method does not count.
            seed: of everything random.
            out: its run folder.
            train: fields of the recipe's `train` beside what every cell has.

        Raises:
            RecipeError: the entry's settings hold faults.
        """
        tree: dict[str, Any] = copy.deepcopy(dict(self.tree))
        section = dict(tree.get("train") or {})
        section.pop("epochs", None)
        every = {"learning_rate": entry.rate, "seed": seed, "max_steps": self.steps, "save_total_limit": 1}
        halves = max(1, math.ceil(self.steps / 2))
        # A budget is spent whole; and a divided pass must not hang on what else the machine holds just now.
        section = {"save_steps": halves, **section, "early_stopping_patience": None, **every}
        if section.get("max_tokens_per_micro_batch", "auto") == "auto":
            section["max_tokens_per_micro_batch"] = room(tree)
        tree["train"] = {**section, **train}
        tree["output_dir"] = str(out.absolute())
        if not entry.is_full:
            tree["method"] = {"name": entry.method, **entry.settings}
        return Recipe.from_dict(tree, f"the recipe of {entry.label}")

    def cell_recipe(self, entry: Candidate, seed: int) -> Recipe:
        """Return the recipe of a cell: without validation where that could choose nothing, being at the end alone."""
        recipe = self.recipe(entry, seed, self.cell(entry, seed))
        t, data = recipe.train, recipe.data
        once = self.steps <= math.ceil(len(self.lengths) / (t.batch_size * t.gradient_accumulation_steps))
        if data.validation is None or t.eval_steps is not None or not once:
            return recipe
        blind = data.model_copy(update={"validation": None, "validation_fraction": 0.0})
        return recipe.model_copy(update={"data": blind})

    @staticmethod
    def text(recipe: Recipe, entry: Candidate) -> str:
        """Return a cell's recipe as YAML; of full fine-tuning without a method, since there is none."""
        if not entry.is_full:
            return recipe.to_yaml()
        rest = {k: v for k, v in recipe.model_dump(mode="json").items() if k != "method"}
        return "# Every weight of the base trains.\n" + yaml.safe_dump(rest, sort_keys=False, allow_unicode=True)

    def cell(self, entry: Candidate, seed: int) -> Path:
        """Return the run folder of a cell."""
        return self.out / "cells" / f"{entry.label}-{seed}"

    def cells(self) -> Iterator[tuple[Candidate, int]]:
        """Yield the cells, all entries of a seed before the next seed: what is there early is comparable."""
        for seed in self.seeds:
            for entry in self.entries:
                yield entry, seed

    def done(self, entry: Candidate, seed: int) -> bool:
        """Return whether a cell was trained and measured."""
        return RunDir(self.cell(entry, seed)).scores_file("test").is_file()  # what is written last

    def identity(self) -> dict[str, Any]:
        """Return what must not change where a comparison goes on."""
        recipe = self.recipe(self.entries[0], self.seeds[0], self.out).model_dump(mode="json")
        return {
            "model": recipe["model"],
            "data": recipe["data"],
            "train": {k: v for k, v in recipe["train"].items() if k not in ("learning_rate", "seed")},
            "tokens": self.tokens,
            "trials": self.trials,
            "rows (SHA-256)": self.digests,
            "methods": {e.label: e.to_dict() for e in self.entries},
        }

    def refuse_another(self) -> None:
        """Look whether the folder can be this comparison's; nothing is written.

        Raises:
            UsageError: it is another comparison's, or holds something else; what differs is named.
        """
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file", "a folder", "give another --out")
        then = self._before()
        held = sorted(p.name for p in self.out.iterdir() if p.name != ".lock") if self.out.is_dir() else []
        if then is None and held:
            raise UsageError(
                f"{self.out} holds no comparison but {format_names(held)}",
                "a folder that is empty or does not exist yet, or a comparison to go on with",
                "give another --out",
            )
        now = self.identity()
        shared = set(now["methods"]) & set((then or now)["methods"])
        found = [
            difference
            for difference in _differences(then or now, now)
            if not difference.startswith("methods.") or difference.split(".")[1].split(":")[0] in shared
        ]
        if found:
            raise UsageError(
                f"{self.out} holds another comparison: {'; '.join(found[:8])}",
                "the command it was started with; methods and seeds may be added",
                "give another --out",
            )

    def claim(self) -> None:
        """Note in the folder what is compared in it; methods that are new come beside those noted before.

        Raises:
            UsageError: as `refuse_another`.
        """
        self.refuse_another()
        now, then = self.identity(), self._before() or {"methods": {}}
        now["methods"] = {**then["methods"], **now["methods"]}
        (self.out / "cells").mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / SETTINGS, to_json(now, indent=2) + "\n")

    def _before(self) -> dict[str, Any] | None:
        file = self.out / SETTINGS
        return json.loads(file.read_text()) if file.is_file() else None


def grid_of(
    tree: Mapping[str, Any],
    entries: Sequence[Candidate],
    *,
    seeds: int,
    tokens: int | None,
    trials: int,
    out: Path,
    force: bool = False,
) -> Grid:
    """Read the rows, and return the cells with their steps.

    Args:
        tree: the recipe's, long form, with its paths made absolute.
        entries: what is compared.
        seeds: how many; the recipe's own is the first, the next ones follow it.
        tokens: trained tokens of a cell, on average; None: as long as the recipe says.
        trials: learning rates tried for each entry.
        out: the folder.
        force: train on data that a survey finds faulty.

    Raises:
        RecipeError: the recipe or an entry's settings hold faults.
        UsageError: no test rows are named, a budget below one step, or nothing to search rates on.
        DataError: the rows are faulty, or none is left.
    """
    own = Recipe.from_dict({**tree, "output_dir": str(out)})
    plain = {k: v for k, v in tree.items() if k != "method"}
    made = Grid(plain, tuple(entries), tuple(own.train.seed + i for i in range(seeds)), tokens, 1, trials, (), out)
    unfit: dict[str, str] = {}
    for entry in entries:  # faults of their settings are said before anything is read
        try:
            made.recipe(entry, own.train.seed, out)
        except RecipeError as e:
            if not entry.by_all:
                raise
            unfit[entry.label] = " ".join(e.message.split())
    made = dataclasses.replace(made, entries=tuple(e for e in entries if e.label not in unfit), unfit=unfit)
    own.require_files()
    if own.data.test is None:
        raise UsageError("the recipe names no test rows, on which methods are compared", "a JSONL file: data.test")
    tokenizer = load_tokenizer_from_recipe(own)
    held, _ = load_eval_dataset(own, tokenizer, own.data.test)
    if len(held) < 2:
        raise UsageError(f"{own.data.test} leaves {len(held)} rows to compare methods on", "two rows or more")
    rows = load_datasets(own, tokenizer)
    for report in filter(None, [] if force else rows.data_reports.values()):
        raise_if_invalid(report)
    if not rows.train:
        raise DataError(f"{own.data.train} leaves no row to train on", "at least one row")
    if trials and not rows.validation:
        raise UsageError(
            "there are no validation rows to search learning rates on", "data.validation", "or leave out --tune"
        )
    rows_a_step = own.train.batch_size * own.train.gradient_accumulation_steps
    lengths = tuple(rows.train.lengths.tolist())
    digests = {"train": rows.train.digest(), "validation": rows.validation.digest(), "test": held.digest()}
    made = dataclasses.replace(made, lengths=lengths, digests=digests, force=force)
    if tokens is None:
        steps = own.train.max_steps or math.ceil(own.train.epochs * math.ceil(len(lengths) / rows_a_step))
        return dataclasses.replace(made, steps=steps)
    a_step = sum(lengths) / len(lengths) * min(rows_a_step, len(lengths))
    if tokens < a_step:
        raise UsageError(
            f"--tokens {tokens} is less than one step: {rows_a_step} rows have {a_step:.0f} tokens on average",
            f"{math.ceil(a_step)} or more",
            "or a smaller --set train.batch_size",
        )
    return dataclasses.replace(made, steps=math.floor(tokens / a_step))


def room(tree: Mapping[str, Any]) -> int:
    """Return how many tokens lie in one pass of every cell where the recipe leaves it to the machine."""
    model = tree.get("model")
    device = model.get("device", "auto") if isinstance(model, Mapping) else "auto"
    return TOKENS_ON_GPU if pick_device(device).type == "cuda" else TOKENS_ON_CPU


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Return what differs between two trees, each as `train.batch_size: 8 then, 4 now`."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        # A field of the recipe that there was not then is one of a newer version, at what it did before it was there.
        keys = dict.fromkeys(then if path in ("model", "data", "train") else [*then, *now])
        return [d for k in keys for d in _differences(then.get(k), now.get(k), f"{path}.{k}" if path else k)]
    # As they would be read back from the file.
    return [] if then == json.loads(to_json(now)) else [f"{path}: {then!r} then, {now!r} now"]
