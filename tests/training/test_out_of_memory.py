"""Memory that runs out anywhere in a run, on purpose: the run ends with the adapter it would have had."""

from __future__ import annotations

import errno
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import recipe_of, write_rows
from transformers.models.llama import modeling_llama as llama

import slimtune.train_step.loss as step_module
import slimtune.training.memory_probe as probe_module
import slimtune.training.train as run_module
from slimtune.adapters import state_dict as adapter_files
from slimtune.data.collator import Collator
from slimtune.errors import DataError, RunError
from slimtune.kernels.unbroken import retry_optimizer_step
from slimtune.models.lm_head import LMHead
from slimtune.training import checkpoint
from slimtune.training.oom_recovery import OomRecovery
from slimtune.training.train import train
from slimtune.training.loop import TrainingLoop
from slimtune.utils.memory import is_out_of_memory

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
)
KINDS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError(CPU),
    lambda: MemoryError(),
    lambda: RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 MB)"),
]
ROOM = 150
"""Tokens in one pass: two passes a step."""


class Fault:
    """An error raised once, at the nth call from when it is armed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], BaseException]) -> None:
        self.patch, self.kind = monkeypatch, kind
        self.armed, self.left, self.raised = False, 0, 0

    def due(self) -> bool:
        if not self.armed:
            return False
        self.left -= 1
        return self.left == 0

    def now(self) -> BaseException:
        self.armed, self.raised = False, self.raised + 1
        return self.kind()

    def at_call(self, owner: Any, name: str, nth: int, *, after: bool = False, backward: bool = False) -> None:
        """Raise in the nth call of a function: before it, after its work, or as its result's gradient comes back."""
        plain, self.left = getattr(owner, name), nth

        def broken(*args: Any, **kwargs: Any) -> Any:
            due = self.due()
            if due and not (after or backward):
                raise self.now()
            found = plain(*args, **kwargs)
            if due and after:
                raise self.now()
            if due:

                def boom(_: Any) -> None:
                    raise self.now()

                (found[0] if isinstance(found, tuple) else found).register_hook(boom)
            return found

        self.patch.setattr(owner, name, broken)

    def arm_at(self, owner: Any, name: str, nth: int = 1) -> None:
        """Arm in the nth call of a function."""
        plain, calls = getattr(owner, name), []

        def arming(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            self.armed = self.armed or len(calls) == nth
            return plain(*args, **kwargs)

        self.patch.setattr(owner, name, arming)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oom")


@pytest.fixture(scope="module")
def plain(tiny_llama: Callable[..., Any], tiny_tokenizer: Callable[..., Any], home: Path) -> dict[str, Any]:
    """Three steps of six rows: LoRA+ (so that the optimizer has several groups), no dropout, fp32."""
    tiny_llama().save_pretrained(home / "base")
    tiny_tokenizer().save_pretrained(home / "base")
    validation = write_rows(home / "validation.jsonl", 6, start=100)
    return {
        "model": {"name": str(home / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(write_rows(home / "train.jsonl", 24)), "validation": str(validation)},
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.0, "lr_ratio": 4.0},
        "train": {
            "max_steps": 3, "batch_size": 6, "learning_rate": 1e-2, "eval_steps": 2, "save_steps": 2,
            "max_tokens_per_micro_batch": ROOM, "max_grad_norm": 0.5,
        },
    }  # fmt: skip


class Run:
    """A run with the gradients and the rows of each of its steps."""

    def __init__(self, settings: dict[str, Any], out: Path, **how: Any) -> None:
        self.out, self.gradients, self.orders = out, [], []
        stepped, begins = SlimTrainer.on_step_end, SlimTrainer.training_step

        def stepping(trainer: SlimTrainer) -> None:
            self.gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.requires_grad])
            stepped(trainer)

        def beginning(trainer: SlimTrainer, model: Any, inputs: Any, *more: Any) -> Any:
            self.orders.append([e["input_ids"] for e in inputs.examples])
            return begins(trainer, model, inputs, *more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlimTrainer, "stepped", stepping)
            patch.setattr(SlimTrainer, "training_step", beginning)
            self.result = train(recipe_of({**settings, "output_dir": str(out)}), **how)
        self.adapter = load_file(out / "adapter" / "adapter_model.safetensors")
        self.metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.events = [m for m in self.metrics if m.get("event") == "out of memory"]

    def is_like(self, other: Run) -> None:
        assert self.orders == other.orders
        for mine, theirs in zip(self.gradients, other.gradients, strict=True):
            assert all((a - b).norm() <= 1e-5 * b.norm() + 1e-9 for a, b in zip(mine, theirs, strict=True))
        assert self.adapter.keys() == other.adapter.keys()
        assert all(torch.allclose(self.adapter[k], t, atol=1e-5) for k, t in other.adapter.items())
        for name in ("train_loss", "validation_loss", "grad_norm"):
            mine, theirs = ([m[name] for m in run.metrics if name in m] for run in (self, other))
            assert mine == pytest.approx(theirs, abs=1e-5)
        for name in ("steps", "trained_tokens", "supervised_tokens", "best_step"):
            assert self.result[name] == other.result[name]
        names = [sorted(p.name for p in (run.out / "checkpoints").iterdir()) for run in (self, other)]
        assert names[0] == names[1]


@pytest.fixture(scope="module")
def undisturbed(plain: dict[str, Any], home: Path) -> Run:
    run = Run(plain, home / "undisturbed")
    assert len(run.gradients) == 3
    assert not run.events
    return run


STEP, EVAL, SAVE = (SlimTrainer, "training_step"), (SlimTrainer, "_scores"), (SlimTrainer, "_save_checkpoint")
LAYER = llama.LlamaDecoderLayer

POINTS: dict[str, tuple[tuple[Any, str], int, tuple[Any, str], int, dict[str, bool]]] = {
    # name: (armed by, in its nth call), (function, its nth call from then on), how
    "laying the rows": (STEP, 1, (Collator, "__call__"), 2, {}),
    "moving a pass to the device": (STEP, 1, (SlimTrainer, "_prepare_inputs"), 1, {}),
    "forward of the first layer": (STEP, 1, (LAYER, "forward"), 1, {}),
    "after the last layer": (STEP, 2, (LAYER, "forward"), 2, {"after": True}),
    "attention": (STEP, 1, (llama.LlamaAttention, "forward"), 2, {"after": True}),
    "feed-forward": (STEP, 3, (llama.LlamaMLP, "forward"), 1, {}),
    "the head and the loss": (STEP, 1, (LMHead, "nats"), 1, {}),
    "backward of the loss": (STEP, 2, (LMHead, "nats"), 1, {"backward": True}),
    "backward of the last layer": (STEP, 1, (LAYER, "forward"), 2, {"backward": True}),
    "backward of the first layer": (STEP, 3, (LAYER, "forward"), 1, {"backward": True}),
    "forward of the second pass": (STEP, 2, (LAYER, "forward"), 3, {}),
    "backward of the second pass": (STEP, 1, (LAYER, "forward"), 3, {"backward": True}),
    "backward of the last pass": (STEP, 2, (LAYER, "forward"), 4, {"backward": True}),
    "norms for clipping": (STEP, 1, (torch.nn.utils, "clip_grad_norm_"), 1, {}),
    "after clipping": (STEP, 2, (torch.nn.utils, "clip_grad_norm_"), 1, {"after": True}),
    "the optimizer's first state": (STEP, 1, (torch, "zeros_like"), 1, {}),
    "half of the optimizer's first states": (STEP, 1, (torch.optim.AdamW, "_init_group"), 2, {}),
    "after one group's first step": (STEP, 1, (torch, "_fused_adamw_"), 1, {"after": True}),
    "after one group's second step": (STEP, 2, (torch, "_fused_adamw_"), 1, {"after": True}),
    "counted but not stepped": (STEP, 2, (torch, "_fused_adamw_"), 1, {}),
    "the second group counted but not stepped": (STEP, 3, (torch, "_fused_adamw_"), 2, {}),
    "evaluation": (EVAL, 1, (LAYER, "forward"), 1, {}),
    "evaluation's last loss": (EVAL, 2, (LMHead, "nats"), 2, {}),
    "a checkpoint's adapter": (SAVE, 1, (adapter_files, "save"), 1, {}),
    "a checkpoint's optimizer": (SAVE, 2, (checkpoint, "save_optimizer"), 1, {"after": True}),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_run_that_ran_out_ends_as_it_would_have(name, plain, undisturbed, tmp_path, monkeypatch, capfd):
    (arming, turn, target, nth, how) = POINTS[name]
    fault = Fault(monkeypatch, KINDS[list(POINTS).index(name) % len(KINDS)])
    fault.at_call(*target, nth, **how)
    fault.arm_at(*arming, turn)
    run = Run(plain, tmp_path / "run")
    assert fault.raised == 1
    run.is_like(undisturbed)
    (event,) = run.events
    assert run.result["oom_events"] == 1
    assert type(fault.kind()).__name__ in event["error"]
    assert "memory ran out in" in capfd.readouterr().err
    assert "Memory ran out" in (tmp_path / "run" / "report.html").read_text()
    last = json.loads((tmp_path / "run/checkpoints/checkpoint-3/progress.json").read_text())
    if event["tokens"]:
        assert event["room_before"] == ROOM
        assert event["room_after"] == event["tokens"] // 2 == last["room"]
    else:
        assert event["room_after"] == event["room_before"] == last["room"]


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


def test_the_texts_by_which_it_is_known():
    for kind in KINDS:
        assert is_out_of_memory(kind())
        assert is_out_of_memory(caused(ValueError("the layer failed"), kind()))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(
        RuntimeError("could not create a primitive")
    )  # what oneDNN said under a real limit, in bf16
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(caused(DataError("a row is faulty"), MemoryError()))


def always(monkeypatch: pytest.MonkeyPatch, module: Any, tokens: int) -> list[int]:
    """Let passes of more than so many tokens run out of memory; return the list of passes that ran."""
    plain, ran = step_module.step_loss, []

    def limited(model: Any, batch: dict[str, Any], *more: Any) -> Any:
        n = batch["input_ids"].numel()
        if n > tokens and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        ran.append(n)
        return plain(model, batch, *more)

    monkeypatch.setattr(module, "step_loss", limited)
    return ran


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_room_is_halved_until_it_fits_and_kept_when_resumed(packing, plain, tmp_path, monkeypatch):
    settings = {**plain, "train": {**plain["train"], "packing": packing, "max_tokens_per_micro_batch": 1000}}
    whole = Run(settings, tmp_path / "whole")
    ran = always(monkeypatch, step_module, 100)
    stop, ends = [], TrainingLoop.train_step

    def kill(trainer: SlimTrainer) -> None:
        ends(trainer)
        if trainer.state.global_step == 3 and not stop:
            stop.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(SlimTrainer, "step_ends", kill)
    with pytest.raises(KeyboardInterrupt):
        Run(settings, tmp_path / "run")
    assert max(ran) <= 100
    halved = (tmp_path / "run" / "train.log").read_text().count("memory ran out")
    assert halved >= 1
    run = Run(settings, tmp_path / "run", resume=True)
    assert len(run.events) == halved  # of the first part; there was none after it
    assert all(torch.allclose(run.adapter[k], t, atol=1e-5) for k, t in whole.adapter.items())


def test_checkpointing_is_turned_on_where_one_row_is_too_much(plain, undisturbed, tmp_path, monkeypatch):
    loss = step_module.step_loss

    def limited(model: Any, *args: Any) -> Any:
        if model.training and not model.is_gradient_checkpointing:
            raise MemoryError
        return loss(model, *args)

    settings = {**plain, "train": {**plain["train"], "max_tokens_per_micro_batch": 1}}
    stand = Run(settings, tmp_path / "one")
    turned = []
    monkeypatch.setattr(run_module, "enable_activation_checkpointing", _noted(run_module.checkpoint_layers, turned))
    monkeypatch.setattr(step_module, "step_loss", limited)
    # What a pass takes is counted before: that is not limited here.
    monkeypatch.setattr(step_module, "measure_activation_bytes", lambda *_: 0)
    run = Run(settings, tmp_path / "run")
    assert len(turned) == len(run.events) == 1
    assert run.events[0]["checkpointing"]
    run.is_like(stand)
    run.is_like(undisturbed)


def _noted(function: Callable[..., Any], calls: list) -> Callable[..., Any]:
    def noting(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return noting


def test_giving_up_leaves_a_checkpoint_and_says_how_to_go_on(plain, undisturbed, tmp_path, monkeypatch):
    settings = {
        **plain,
        "output_dir": str(tmp_path / "run"),
        "train": {**plain["train"], "save_steps": 2, "eval_steps": 3},
    }
    whole = Run(settings, tmp_path / "whole")
    fault = []
    accumulated = SlimTrainer._gradients

    def full(trainer: SlimTrainer, model: Any) -> Any:
        if trainer.state.global_step == 1 and not fault:
            always(monkeypatch, step_module, 0)
        return accumulated(trainer, model)

    with monkeypatch.context() as patch:
        loss = step_module.step_loss
        patch.setattr(SlimTrainer, "_gradients", full)
        with pytest.raises(RunError, match=r"not enough memory for \d+ tokens of one row \(a training step") as e:
            train(recipe_of(settings))
    monkeypatch.setattr(step_module, "step_loss", loss)
    assert "checkpoint-1 is whole" in e.value.hint
    assert f"slimtune train {tmp_path / 'run' / 'recipe.yaml'} --resume" in e.value.hint
    assert checkpoint.find_damage(tmp_path / "run" / "checkpoints" / "checkpoint-1") == ""
    run = Run(settings, tmp_path / "run", resume=True)
    assert len(run.gradients) == 2  # nothing is done twice
    assert all(torch.allclose(run.adapter[k], t, atol=1e-5) for k, t in whole.adapter.items())


def test_the_probe_finds_its_room_before_training(plain, undisturbed, tmp_path, monkeypatch):
    fault = Fault(monkeypatch, KINDS[1])
    fault.at_call(LAYER, "forward", 1, after=True)
    fault.arm_at(run_module, "probe")
    band = {"need_bytes": {"low": 1, "high": 1000}, "parts": {"optimizer": 0}, "max_tokens_per_micro_batch": ROOM}
    run = Run(plain, tmp_path / "run", planner=lambda *_: band)
    assert fault.raised == 1
    run.is_like(undisturbed)
    (event,) = run.events
    assert event["step"] == 0
    assert event["planned_bytes"] == 1000
    assert "more than were planned" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["probe"]["tokens"] <= event["room_after"]
    assert probe_module.planned_bytes(band, torch.device("cpu")) == (1, 1000)


def test_what_runs_out_between_two_steps_is_told_with_the_last_checkpoint(plain, tmp_path, monkeypatch):
    fault = Fault(monkeypatch, KINDS[0])
    fault.at_call(SlimTrainer, "stepped", 3)
    fault.arm_at(SlimTrainer, "training_step")
    with pytest.raises(RunError, match="not enough memory for what lies between two steps") as e:
        train(recipe_of({**plain, "output_dir": str(tmp_path / "run")}))
    assert "checkpoint-2 is whole" in e.value.hint


def test_a_failed_try_leaves_nothing_behind(tmp_path):
    """Not even by the traceback, whose frames hold a pass; nor do random numbers go on."""
    held, drawn, left = [], [], [3]

    def work() -> int:
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        drawn.append(torch.rand(1).item())
        left[0] -= 1
        if left[0]:
            raise torch.OutOfMemoryError(f"no room for {tensor.shape}")
        return 7

    def undo() -> None:
        gc.disable()  # no collector is needed for it
        assert held[-1]() is None

    try:
        relief = OomRecovery(Collator(0, room=16), torch.device("cpu"), lambda _: None, lambda _: None)
        rows = [{"input_ids": [1, 2, 3, i], "labels": [1, 2, 3, i]} for i in range(4)]
        assert relief.passes("a test", rows, work, undo) == 7
    finally:
        gc.enable()
    assert len(drawn) == 3
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("agreed", [True, False])
def test_others_may_have_run_out(agreed):
    """A process whose own try went well does it again where another's did not."""
    calls, answers = [], iter([agreed, False])
    relief = OomRecovery(
        Collator(0, room=8), torch.device("cpu"), lambda _: None, lambda _: None, agreed=lambda _: next(answers)
    )
    rows = [{"input_ids": [1, 2, i], "labels": [1, 2, i]} for i in range(4)]
    relief.passes("a test", rows, lambda: calls.append(relief.collator.room), lambda: None)
    assert calls == ([8, 3] if agreed else [8])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("earlier", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("nth", range(1, 5))
def test_an_optimizers_step_is_finished_exactly(fused, earlier, nth, monkeypatch):
    """Wherever in its step memory runs out: parameters and moments are bit for bit those of one whole step."""

    def run(break_at: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        some = [torch.nn.Parameter(torch.randn(3, n)) for n in (2, 5, 4)]
        groups = [{"params": some[:2]}, {"params": some[2:], "lr": 0.5}]
        optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused, foreach=False)
        calls = []

        def again(step: Any, undo: Any) -> Any:
            try:
                return step()
            except MemoryError:
                undo()
                calls.append(1)
            return step()

        retry_optimizer_step(optimizer, again)
        for number in range(4):
            for p in some:
                p.grad = torch.randn_like(p)
            with pytest.MonkeyPatch.context() as patch:
                if number == earlier and break_at:
                    fault = Fault(patch, MemoryError)
                    # AdamW's inner loop over parameters, or its calls over a group
                    owner = (torch, "_fused_adamw_") if fused else (torch.Tensor, "addcdiv_")
                    fault.at_call(*owner, (break_at + 1) // 2, after=break_at % 2 == 0)
                    fault.armed = True
                optimizer.step()
                assert all(p.grad is not None for p in some)
        assert len(calls) == bool(break_at)
        return [
            t for p in some for t in (p.detach(), *(optimizer.state[p][k] for k in ("step", "exp_avg", "exp_avg_sq")))
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(nth), run(0), strict=True))
