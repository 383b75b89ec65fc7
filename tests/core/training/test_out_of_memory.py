"""Memory runs out on purpose, anywhere in a run: the run ends with the adapter it would have had, or can be resumed."""

from __future__ import annotations

import copy
import errno
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from error_facts import has_code
from tiny_run import distance, metrics, recipe_of, train_until
from transformers.models.llama import modeling_llama as llama

import slimtune.core.training.loss as loss_module
import slimtune.core.training.training_loop as loop_module
import slimtune.planning.memory_probe as probe_module
from slimtune.core.adapters import adapter_files
from slimtune.core.data.collator import Collator
from slimtune.core.models.lm_head import LMHead
from slimtune.core.training import checkpoint
from slimtune.core.training.oom_recovery import OomRecovery
from slimtune.core.training.progress_logger import ProgressLogger
from slimtune.core.training.train import train
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import DataError, RunError, is_out_of_memory
from slimtune.planning.interval import Interval

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
KINDS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError(CPU),
    lambda: MemoryError(),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 MB)"),
]
MAX_TOKENS = 150
"""Tokens in a micro-batch: two micro-batches per step."""


class Fault:
    """An error raised once, at the nth call of a function after it was armed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], BaseException]) -> None:
        self.patch, self.kind = monkeypatch, kind
        self.armed, self.left, self.raised = False, 0, 0

    def now(self) -> BaseException:
        self.armed, self.raised = False, self.raised + 1
        return self.kind()

    def at_call(self, owner: Any, name: str, nth: int, when: str = "before") -> None:
        """Raise "before" the nth call, "after" its work, or when its result's gradient arrives ("backward")."""
        original, self.left = getattr(owner, name), nth

        def broken(*args: Any, **kwargs: Any) -> Any:
            self.left -= self.armed
            due = self.armed and self.left == 0
            if due and when == "before":
                raise self.now()
            result = original(*args, **kwargs)
            if due and when == "after":
                raise self.now()
            if due:

                def fail(_: Any) -> None:
                    raise self.now()

                (result[0] if isinstance(result, tuple) else result).register_hook(fail)
            return result

        self.patch.setattr(owner, name, broken)

    def arm_at(self, owner: Any, name: str, nth: int = 1) -> None:
        """Arm in the nth call of a function."""
        original, calls = getattr(owner, name), []

        def arming(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            self.armed = self.armed or len(calls) == nth
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, arming)


class Run:
    """A run with the rows of each of its steps."""

    def __init__(self, settings: dict[str, Any], out: Path, **options: Any) -> None:
        self.out, self.orders = out, []
        train_step = TrainingLoop.train_step

        def recording(loop: TrainingLoop, rows: Any) -> Any:
            self.orders.append([e["input_ids"] for e in rows])
            return train_step(loop, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "train_step", recording)
            self.result = train(recipe_of({**settings, "output_dir": str(out)}), **options)
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        self.events = [m for m in lines if m.get("event") == "out of memory"]

    def assert_same_as(self, other: Run) -> None:
        assert self.orders == other.orders
        assert distance(self.out, other.out) < 1e-5
        for name in ("train_loss", "validation_loss", "grad_norm"):
            assert metrics(self.out, name) == pytest.approx(metrics(other.out, name), abs=1e-5)
        for name in ("steps", "trained_tokens", "supervised_tokens", "best_step"):
            assert getattr(self.result, name) == getattr(other.result, name)
        names = [sorted(p.name for p in (run.out / "checkpoints").iterdir()) for run in (self, other)]
        assert names[0] == names[1]


@pytest.fixture(scope="module")
def plain(shared_settings: dict[str, Any]) -> dict[str, Any]:
    """Three steps of six rows, without dropout, fp32."""
    return {
        **copy.deepcopy(shared_settings),
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.0},
        "train": {
            "max_steps": 3, "batch_size": 6, "learning_rate": 1e-2, "eval_steps": 2, "save_steps": 2,
            "max_tokens_per_micro_batch": MAX_TOKENS, "max_grad_norm": 0.5,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(plain, tmp_path_factory.mktemp("oom") / "undisturbed")
    assert len(run.orders) == 3
    assert not run.events
    return run


STEP, EVAL = (TrainingLoop, "train_step"), (TrainingLoop, "log_validation_loss")
SAVE = (TrainingLoop, "save_checkpoint")
LAYER = llama.LlamaDecoderLayer

POINTS: dict[str, tuple[tuple[Any, str], int, tuple[Any, ...]]] = {
    # name: (armed by, in its nth call), (function, its nth call from then on, when)
    "collating": (STEP, 1, (Collator, "__call__", 2)),
    "moving to the device": (STEP, 1, (loop_module, "move_batch_to_device", 1)),
    "forward": (STEP, 1, (LAYER, "forward", 1)),
    "after the last layer": (STEP, 2, (LAYER, "forward", 2, "after")),
    "the loss": (STEP, 1, (LMHead, "target_nll", 1)),
    "backward of the loss": (STEP, 2, (LMHead, "target_nll", 1, "backward")),
    "backward of the first layer": (STEP, 3, (LAYER, "forward", 1, "backward")),
    "backward of the last micro-batch": (STEP, 2, (LAYER, "forward", 4, "backward")),
    "clipping": (STEP, 1, (torch.nn.utils, "clip_grads_with_norm_", 1)),
    "after clipping": (STEP, 2, (torch.nn.utils, "clip_grads_with_norm_", 1, "after")),
    "evaluation": (EVAL, 1, (LAYER, "forward", 1)),
    "evaluation's last loss": (EVAL, 2, (LMHead, "target_nll", 2)),
    "a checkpoint's adapter": (SAVE, 1, (adapter_files, "save_adapter", 1)),
    "a checkpoint's optimizer": (SAVE, 2, (checkpoint, "save_optimizer", 1, "after")),
}


FAST_POINTS = ("forward", "backward of the first layer", "evaluation")


@pytest.mark.parametrize("name", [p if p in FAST_POINTS else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_run_recovers(name, plain, undisturbed, tmp_path, monkeypatch, capfd):
    arming, turn, target = POINTS[name]
    fault = Fault(monkeypatch, KINDS[list(POINTS).index(name) % len(KINDS)])
    fault.at_call(*target)
    fault.arm_at(*arming, turn)
    run = Run(plain, tmp_path / "run")
    assert fault.raised == 1
    run.assert_same_as(undisturbed)
    (event,) = run.events
    assert run.result.oom_events == 1
    assert type(fault.kind()).__name__ in event["error"]
    assert event["text"] in capfd.readouterr().err
    last = json.loads((run.out / "checkpoints" / "checkpoint-3" / checkpoint.STATE_FILE).read_text())
    assert event["max_tokens_before"] == MAX_TOKENS
    smaller = event["tokens"] // 2 if event["tokens"] else MAX_TOKENS
    assert event["max_tokens_after"] == last["max_tokens"] == smaller


@pytest.mark.parametrize(
    ("owner", "name", "turn", "what", "newest"),
    [
        (torch.optim.AdamW, "_init_group", 3, "the optimizer's step", 2),
        (torch, "_fused_adamw_", 3, "the optimizer's step", 2),
        (ProgressLogger, "log", 1, "work between two steps", 1),
    ],
)
def test_work_that_cannot_be_repeated_ends_the_run_resumably(
    owner, name, turn, what, newest, plain, undisturbed, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        fault = Fault(patch, KINDS[turn % 2])
        fault.at_call(owner, name, 1)
        fault.arm_at(*STEP, turn)
        with pytest.raises(RunError, match=what) as e:
            Run(plain, tmp_path / "run")
    assert f"checkpoint-{newest} " in e.value.hint
    assert f"slimtune train {tmp_path / 'run' / 'recipe.yaml'} --resume" in e.value.hint
    assert distance(Run(plain, tmp_path / "run", resume=True).out, undisturbed.out) == 0


def limit_micro_batches(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let larger micro-batches of training run out of memory; return the list of sizes that ran."""
    original, ran = loss_module.compute_step_loss, []

    def limited(model: Any, batch: dict[str, Any], *more: Any) -> Any:
        n = batch["input_ids"].numel()
        if n > tokens and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ran.append(n)
        return original(model, batch, *more)

    monkeypatch.setattr(loss_module, "compute_step_loss", limited)
    return ran


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.slow
def test_smaller_size_is_kept_when_resumed(packing, plain, undisturbed, tmp_path, monkeypatch):
    settings = {**plain, "train": {**plain["train"], "packing": packing, "max_tokens_per_micro_batch": 1000}}
    ran = limit_micro_batches(monkeypatch, 100)
    train_until(recipe_of({**settings, "output_dir": str(tmp_path / "run")}), monkeypatch, 2, KeyboardInterrupt)
    assert max(ran) <= 100
    events = (tmp_path / "run" / "train.log").read_text().count("memory ran out")
    assert events >= 1
    run = Run(settings, tmp_path / "run", resume=True)
    assert len(run.events) == events  # all of them before the interruption
    assert distance(run.out, undisturbed.out) < 1e-5


def test_checkpointing_is_turned_on_when_one_row_does_not_fit(plain, undisturbed, tmp_path, monkeypatch):
    step_loss = loss_module.compute_step_loss

    def limited(model: Any, *args: Any) -> Any:
        if model.training and not model.is_gradient_checkpointing:
            raise MemoryError
        return step_loss(model, *args)

    monkeypatch.setattr(loss_module, "compute_step_loss", limited)
    monkeypatch.setattr(loss_module, "measure_activation_bytes", lambda *_: 0)
    settings = {**plain, "train": {**plain["train"], "max_tokens_per_micro_batch": 1}}
    run = Run(settings, tmp_path / "run")
    (event,) = run.events
    assert event["checkpointing"]
    run.assert_same_as(undisturbed)


@pytest.mark.slow
def test_giving_up_leaves_a_checkpoint(plain, undisturbed, tmp_path, monkeypatch):
    settings = {**plain, "train": {**plain["train"], "eval_steps": 3}}
    compute = TrainingLoop.compute_gradients

    def full(loop: TrainingLoop, rows: Any) -> Any:
        if loop.state.step == 1:
            limit_micro_batches(patch, 0)
        return compute(loop, rows)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "compute_gradients", full)
        with pytest.raises(RunError, check=has_code("system-memory")) as e:
            train(recipe_of({**settings, "output_dir": str(tmp_path / "run")}))
    assert "checkpoint-1 " in e.value.hint
    run = Run(settings, tmp_path / "run", resume=True)
    assert len(run.orders) == 2  # nothing is done twice
    assert distance(run.out, undisturbed.out) < 1e-5


@dataclass(frozen=True)
class HandMadePlan:
    """What a run reads of its plan."""

    need_bytes: Interval
    runtime_bytes: Interval
    parts: dict[str, int]
    max_tokens_per_micro_batch: int


def test_probe_recovers_before_training(plain, undisturbed, tmp_path, monkeypatch):
    fault = Fault(monkeypatch, KINDS[1])
    fault.at_call(LAYER, "forward", 1, "after")
    fault.arm_at(probe_module, "probe_longest_micro_batch_tokens_and_memory")
    plan = HandMadePlan(Interval(1, 1000), Interval(0, 1000), {"optimizer": 0}, MAX_TOKENS)
    run = Run(plain, tmp_path / "run", planner=lambda *_: plan)
    run.assert_same_as(undisturbed)
    (event,) = run.events
    assert (event["step"], event["planned_bytes"]) == (0, 1000)
    assert event["text"] in (run.out / "train.log").read_text()
    assert json.loads((run.out / "plan.json").read_text())["probe"]["tokens"] <= event["max_tokens_after"]


# --- without a run ----------------------------------------------------------------------------------------------------


def recover(max_tokens: int, work: Callable[[Collator], Any], undo: Callable[[], Any] = str, **options: Any) -> Any:
    """Run work on four rows of four tokens."""
    rows = [{"input_ids": [1, 2, 3, i], "labels": [1, 2, 3, i]} for i in range(4)]
    collator = Collator(0, max_tokens=max_tokens)
    silent = SimpleNamespace(say=lambda _: None, record=lambda _: None)
    recovery = OomRecovery(collator, torch.device("cpu"), silent, **options)
    return recovery.run_in_micro_batches("a test", rows, lambda: work(collator), undo)


@pytest.mark.slow
def test_failed_try_leaves_nothing_behind():
    """Not even through the traceback, whose frames refer to the tensors; random numbers are drawn again."""
    tensors, drawn = [], []

    def work(_: Collator) -> int:
        tensor = torch.ones(1000)
        tensors.append(weakref.ref(tensor))
        drawn.append(torch.rand(1).item())
        if len(drawn) < 3:
            raise torch.OutOfMemoryError(f"no room for {tensor.shape}")
        return 7

    def undo() -> None:
        gc.disable()  # reference counts suffice
        assert tensors[-1]() is None

    try:
        assert recover(16, work, undo) == 7
    finally:
        gc.enable()
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("failed", [True, False])
def test_all_processes_repeat_what_failed_in_one(failed):
    sizes, answers = [], iter([failed, False])
    recover(8, lambda collator: sizes.append(collator.max_tokens), any_failed=lambda _: next(answers))
    assert sizes == ([8, 4] if failed else [8])


def test_errors_by_which_it_is_recognized():
    def caused(error: BaseException, by: BaseException) -> BaseException:
        error.__cause__ = by
        return error

    for kind in KINDS:
        assert is_out_of_memory(kind())
        assert is_out_of_memory(caused(ValueError("the layer failed"), kind()))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN under a real limit, in bf16
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(caused(DataError("a row is faulty"), MemoryError()))
