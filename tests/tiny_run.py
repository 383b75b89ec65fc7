"""Rows and recipes that train in a second."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row_files import write_jsonl
from safetensors.torch import load_file

from slimtune.core.config import Recipe
from slimtune.core.training.train import InterruptedAfterCheckpoint, train
from slimtune.core.training.train_result import TrainResult
from slimtune.core.training.training_loop import TrainingLoop


def write_rows(path: Path, n: int, start: int = 0, answer: str = "abc ") -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer * (1 + i % 5)}]}
        for i in range(start, start + n)
    )
    return write_jsonl(path, rows)


def settings_of_base(base: Path, home: Path, **model: Any) -> dict[str, Any]:
    """Write rows; return settings of a recipe for a base: 24 rows, 6 a step, 2 epochs of 4 steps, no budget."""
    return {
        "model": {"name": str(base), "dtype": "float32", **model},
        "data": {
            "train": str(write_rows(home / "train.jsonl", 24)),
            "validation": str(write_rows(home / "validation.jsonl", 6, start=100)),
        },
        "method": {"name": "lora", "r": 4},
        "train": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "forgetting_budget": None},
        "output_dir": str(home / "run"),
    }


def write_settings(home: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> dict[str, Any]:
    """Write a base and rows; return settings of a recipe with dropout (see `settings_of_base`)."""
    tiny_llama().save_pretrained(home / "base")
    tiny_tokenizer().save_pretrained(home / "base")
    settings = settings_of_base(home / "base", home)
    return {**settings, "method": {**settings["method"], "lora_dropout": 0.1}, "output_dir": str(home / "whole")}


def recipe_of(settings: dict[str, Any], **train: Any) -> Recipe:
    return Recipe.from_dict({**settings, "train": {**settings["train"], **train}})


def do_at(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[], Any]) -> None:
    """Change something as a run begins the step after `step` steps."""
    train_step = TrainingLoop.train_step

    def changed(loop: TrainingLoop, rows: Any) -> Any:
        if loop.state.step == step:
            change()
        return train_step(loop, rows)

    monkeypatch.setattr(TrainingLoop, "train_step", changed)


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException] = InterruptedAfterCheckpoint
) -> None:
    """Let Ctrl-C, or another error, come as a run begins the step after `step` steps."""

    def stop() -> None:
        if error is not InterruptedAfterCheckpoint:
            raise error
        os.kill(os.getpid(), signal.SIGINT)

    do_at(monkeypatch, step, stop)


def train_until(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    error: type[BaseException] = InterruptedAfterCheckpoint,
    **how: Any,
) -> Path:
    """Train a recipe until Ctrl-C, or another error, comes after `step` steps; return its folder."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, error)
        with pytest.raises(error):
            train(recipe, **how)
    return Path(recipe.output_dir)


def train_in_two_parts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int) -> TrainResult:
    """Train a recipe until Ctrl-C comes after `step` steps, then resume it to its end; return its result."""
    train_until(recipe, monkeypatch, step)
    return train(recipe, resume=True)


def adapter(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def distance(run: str | Path, other: str | Path) -> float:
    """Largest difference between the adapters of two runs; 0: they are equal bit for bit."""
    a, b = adapter(run), adapter(other)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if a[k].numel())


def metrics(run: str | Path, name: str) -> list[float]:
    """The logged values of one name, such as train_loss."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [m[name] for m in lines if name in m]
