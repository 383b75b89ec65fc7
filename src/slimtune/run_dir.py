"""A run folder: what one run writes, by name.

    recipe.yaml     the recipe, resolved         train.log     what was said
    plan.json       the plan, and what the longest pass took
    data.json       what `slimtune data` reports on the training and the validation file
    adapter/        the best adapter             report.html   all of it on one page
    checkpoints/    to resume from               result.json   what `slimtune train --json` printed
    metrics.jsonl   one JSON object a line       tensorboard/  its event files, with train.report_to

A file is written beside its place and moved there when it is whole, so a reader never meets half of one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .config import Recipe, load_recipe
from .errors import RunError, UsageError, format_names, nearest
from .utils.files import translate_disk_full, write_atomic

__all__ = ["RunDir", "to_json", "write_atomic"]

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class RunDir:
    """One run's folder.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The folder of the best adapter."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints to resume from."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        """What was said while training."""
        return self.path / "train.log"

    @property
    def report_file(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files, where the recipe asks for them."""
        return self.path / "tensorboard"

    @property
    def plan_file(self) -> Path:
        """The plan, and what the longest pass really took."""
        return self.path / "plan.json"

    @property
    def data_file(self) -> Path:
        """The reports on the training and the validation file."""
        return self.path / "data.json"

    @property
    def result_file(self) -> Path:
        """What `slimtune train --json` printed."""
        return self.path / "result.json"

    def evaluation(self, name: str) -> Path:
        """What `slimtune eval` found on rows of that name: "test", "validation", or "data-" and a file's."""
        return self.path / f"eval-{name}.json"

    def scores(self, name: str) -> Path:
        """What each of those rows took."""
        return self.path / f"scores-{name}.json"

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> Self:
        """Make a new run folder and write the recipe into it.

        Raises:
            UsageError: something lies at the path already, or the folder cannot be made there.
            RunError: the disk is full.
        """
        run = cls.new(path)
        try:
            with translate_disk_full(run.path):
                run.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UsageError(
                f"{run.path} cannot be made: {e.strerror}", "a writable place", "give another --out"
            ) from e
        write_atomic(run.recipe_file, recipe.to_yaml())
        return run

    @classmethod
    def new(cls, path: str | Path) -> Self:
        """Return the run folder to be made at the path; nothing is written yet.

        Raises:
            UsageError: a file, another run or other files lie there.
        """
        run = cls(Path(path))
        if run.path.exists() and not run.path.is_dir():
            raise UsageError(f"{run.path} is a file", "a folder that does not exist yet", "give another --out")
        if run.path.is_dir() and (held := sorted(p.name for p in run.path.iterdir())):
            is_run = run.recipe_file.name in held
            raise UsageError(
                f"{run.path} already holds {'another run' if is_run else 'files'}: {format_names(held)}",
                "a folder that is empty or does not exist yet",
                f"{'go on with that run: --resume; or ' if is_run else ''}give another --out",
            )
        return run

    @classmethod
    def open(cls, path: str | Path, adapter: bool = True) -> Self:
        """Return the run folder that lies at the path.

        Args:
            path: the folder.
            adapter: whether it has to hold a trained adapter already.

        Raises:
            UsageError: there is no such folder (the nearest name beside it is given), or it is no run folder.
            RunError: the run has no adapter yet.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            beside = [p.name for p in run.path.parent.iterdir() if p.is_dir()] if run.path.parent.is_dir() else []
            raise UsageError(f"there is no run folder {str(run.path)!r}{nearest(run.path.name, beside)}")
        if not run.recipe_file.is_file():
            held = format_names(sorted(p.name for p in run.path.iterdir()))
            raise UsageError(f"{run.path} is no run folder: it holds {held or 'nothing'}", "a folder with recipe.yaml")
        if adapter and not (run.adapter / ADAPTER_FILE).is_file():
            raise RunError(
                f"the run in {run.path} has no adapter yet",
                f"{run.adapter / ADAPTER_FILE}",
                f"finish it: slimtune train {run.recipe_file} --resume",
            )
        return run

    def recipe(self) -> Recipe:
        """Return the recipe the run was made from, `out` being where the folder lies now.

        Raises:
            UsageError: there is none.
            RecipeError: it holds faults.
        """
        return load_recipe(self.recipe_file, {"out": str(self.path)})

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append one JSON line to the metrics; what a killed run left of its last line goes first.

        Raises:
            RunError: the disk is full.
        """
        line = to_json(values).encode() + b"\n"
        with translate_disk_full(self.metrics_file, len(line)), open(self.metrics_file, "ab+") as f:
            if f.seek(0, os.SEEK_END) and not _ends_whole(self.metrics_file):
                f.truncate(_whole_length(self.metrics_file))
            f.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics, oldest first; a last line without its end is what a killed run left, and is no metric.

        Raises:
            RunError: a line is not JSON; its number and text are given.
        """
        if not self.metrics_file.is_file():
            return []
        found = []
        text = self.metrics_file.read_bytes()[: _whole_length(self.metrics_file)].decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise RunError(
                    f"{self.metrics_file}, line {number} is not JSON ({e.msg}): {line[:80]!r}",
                    "one JSON object a line",
                    "take the line out",
                ) from None
        return found


def to_json(values: Any, indent: int | None = None) -> str:
    """Return JSON of plain values, mappings, lists and paths; a number that is not finite becomes null."""
    return json.dumps(_plain(values), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _ends_whole(file: Path) -> bool:
    with open(file, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def _whole_length(file: Path) -> int:
    return file.read_bytes().rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str | int | float):
        value = value.item()  # a scalar of numpy or torch
    return None if isinstance(value, float) and not math.isfinite(value) else value
