"""What every adapter promises, each in one line of a test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from models_zoo import run, same_base, snapshot
from torch import Tensor, nn

import slimtune


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors' values."""
    return (a - b).abs().max().item()


def run_with(model: nn.Module, adapter: str, call: Callable[[], Any]) -> Any:
    """Return what a call of a model returns with one adapter, or with none for "__base__"."""
    if adapter == "__base__":
        with model.disable_adapter():
            return call()
    before = model.active_adapters
    model.set_adapter(adapter)
    returned = call()
    model.set_adapter(before)
    return returned


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Fail if a model has other classes, values or trained parameters after the `with`."""

    def describe() -> tuple[dict, dict]:
        return {n: type(m) for n, m in model.named_modules()}, {n: p.requires_grad for n, p in model.named_parameters()}

    before, values = describe(), snapshot(model)
    yield
    assert describe() == before
    assert same_base(model, values)


def assert_merges(model: nn.Module, run: Callable[[nn.Module], Tensor] = run, close: float = 1e-9) -> None:
    """Fail if the merged model says something else, or if it does so after the merge is undone."""
    expected = run(model)
    model.merge_adapter()
    assert distance(run(model), expected) < close
    model.unmerge_adapter()
    assert torch.equal(run(model), expected)


def assert_loads(
    model: nn.Module,
    base: Callable[[], nn.Module],
    folder: Path,
    run: Callable[[nn.Module], Tensor] = run,
    close: float = 1e-9,
) -> None:
    """Fail if the saved adapter says something else in slimtune or in HF PEFT, or in slimtune once HF PEFT saved it."""
    expected = run(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    for home in (slimtune, peft, slimtune):
        loaded = home.PeftModel.from_pretrained(base(), folder).eval()
        assert distance(run(loaded), expected) < close, home.__name__
        loaded.save_pretrained(folder, save_embedding_layers=False)
