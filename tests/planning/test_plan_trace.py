"""The traced step against real ones: state and peak by the events of torch's own allocator, for every method."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from methods.cases import CASES
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from slimtune.errors import ModelError
from slimtune.kernels import activation_offload, cross_entropy
from slimtune.planning.fake_tensors import all_tensors, fake_mode, make_fake, restore_module
from slimtune.planning.memory_trace import trace_memory
from slimtune.planning.training_job import TrainingJob
from slimtune.setup import build_meta_model

_file = Path(__file__).parents[2] / "benchmarks/plan_ways/referee.py"
_spec = importlib.util.spec_from_file_location("plan_referee", _file)
referee = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(referee)

FP32, BF16 = torch.float32, torch.bfloat16
ENDS = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **ENDS}
BASES = {
    "llama": lambda **more: tf.LlamaConfig(**{**SIZES, "intermediate_size": 128, **more}),
    "gpt2": lambda: tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **ENDS),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, intermediate_size=128, head_dim=16, sliding_window=32),
}
ROWS = [((120, 80), True, 2), ((90, 60), False, 1), ((90, 90), False, 2), ((70, 50, 30), True, 3), ((130,), True, 1)]
"""Lengths, whether they lie in one sequence, and passes."""
WAYS = dict(zip(sorted(CASES), itertools.cycle(itertools.product(BASES, ROWS)), strict=False))
# oneDNN's LSTM keeps a workspace of which a fake one knows nothing.
WORKSPACE = {"p_tuning+lstm"}


def method_of(method, base="llama"):
    return CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}))


def job_of(base, method, rows=ROWS[0], dtype=FP32, base_settings=None, **more):
    lengths, packing, passes = rows
    adapter = None if method is None else method_of(method, base)
    return TrainingJob(BASES[base](**(base_settings or {})), adapter, dtype, lengths, passes, packing=packing, **more)


def off(make):
    """Return by how much a traced step differs from a real one: in state, and in its peak."""
    traced, (state, peak) = trace_memory(make()), referee.measured(make())
    return abs(sum(traced.state.values()) / state - 1), abs(traced.step / peak - 1)


@pytest.mark.parametrize("method", sorted(CASES))
def test_every_method_takes_what_its_real_step_takes(method):
    base, rows = WAYS[method]
    state, peak = off(lambda: job_of(base, method, rows))
    assert state == pytest.approx(0, abs=1e-4)
    assert peak < (0.05 if method in WORKSPACE else 0.003)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [ROWS[4], ROWS[2]], ids=str)
def test_full_fine_tuning(rows, tied, monkeypatch):
    """A tied weight's gradients, of the head's chunks and of the embedding, are summed in place."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 32 * 8192)
    sizes = {"vocab_size": 8192, "tie_word_embeddings": tied}
    state, peak = off(lambda: job_of("llama", None, rows, base_settings=sizes, checkpointing=True))
    assert state == pytest.approx(0, abs=1e-4)
    assert peak < 0.003


@pytest.mark.parametrize(("base", "method"), [("llama", "lora"), ("gpt2", "bottleneck"), ("gemma2", "prefix_tuning")])
def test_half_precision_and_checkpointing(base, method):
    """Beside what is traced come some kB: oneDNN's copies for bf16 products, a random state for each checkpoint."""
    state, peak = off(lambda: job_of(base, method, ROWS[3], BF16, checkpointing=True))
    assert state == pytest.approx(0, abs=1e-4)
    assert peak < 0.02


@pytest.mark.parametrize("base", BASES)
def test_tiles_and_what_is_sent_away(base):
    """So small, the random states of the maps in tiles (5 kB each) show; benchmarks/plan.py has them larger."""
    state, peak = off(lambda: job_of(base, "lora", ROWS[3], checkpointing=True, offload=True, tile=32))
    assert state == pytest.approx(0, abs=1e-4)
    assert peak < 0.04


def test_what_is_sent_away_from_a_gpu_is_counted_as_the_machine_s(monkeypatch):
    """Each layer's input of 130 tokens goes, and is not held beside; on a CPU it is held all the same."""
    monkeypatch.setattr(activation_offload, "LEAST", 1)
    rows, deep = ROWS[4], {"num_hidden_layers": 8}
    here, gone, cpu = (
        trace_memory(job_of("llama", "lora", rows, base_settings=deep, checkpointing=True, device=device, offload=away))
        for device, away in (("cuda", False), ("cuda", True), ("cpu", True))
    )
    inputs, trained = 8 * 130 * 64 * 4, here.state["adapters"] + here.state["optimizer"]
    copies = pytest.approx(trained, rel=0.05)  # of what an optimizer's step changes, for its length
    assert (here.host, gone.host, cpu.host) == (copies, max(inputs, here.host), 0)
    assert gone.host == inputs or inputs < here.host
    last = "backward, last layer"
    assert here.peaks[last] - gone.peaks[last] == pytest.approx(inputs * 6 / 8, rel=0.1)  # two are there


def test_the_parts_are_what_they_are_called():
    model = build_meta_model(BASES["llama"](), method_of("lora"), FP32)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    others = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - trained
    traced = trace_memory(job_of("llama", "lora"))
    count = sum(1 for p in model.parameters() if p.requires_grad)
    assert traced.state["adapters"] == trained
    assert traced.state["optimizer"] == 2 * trained + 4 * count  # two moments, and a step for each parameter
    assert others <= traced.state["weights"] <= 1.01 * others
    assert {p: held["gradients"] for p, held in traced.phases.items()} == {
        **dict.fromkeys(traced.phases, trained),  # those of the pass before
        "evaluation": 0,
    }
    assert sum(size for _, size in traced.events) < sum(traced.state.values()) + 20_000  # all but the rows came back
    assert traced.step == max(itertools.gradient_accumulation_steps(size for _, size in traced.events))


def test_one_pass_has_no_gradients_beside_it():
    one, two = (trace_memory(job_of("llama", "lora", ((100,), True, n))) for n in (1, 2))
    assert one.phases["loss"]["gradients"] == 0
    assert two.phases["loss"]["gradients"] == one.state["adapters"]
    three = trace_memory(job_of("llama", "lora", ((100,), True, 3)))
    batch = 5 * 8 * 100  # five rows of whole numbers at most
    assert two.step < three.step <= two.step + batch


def test_on_cuda_every_storage_takes_whole_blocks():
    traced = trace_memory(job_of("llama", "lora", device="cuda"))
    assert all(size % 512 == 0 for _, size in traced.events)
    assert sum(traced.state.values()) % 512 == 0


@pytest.mark.parametrize("method", ["adalora", "vera", "prompt_tuning"])
def test_a_trace_leaves_what_it_is_given_and_no_seed_is_used_up(method):
    """A plan before a run leaves the run what it would be."""
    job = job_of("llama", method)
    before, random = copy.deepcopy((job.base.to_dict(), job.method.to_dict())), torch.get_rng_state()
    first, again = trace_memory(job), trace_memory(job)
    assert (job.base.to_dict(), job.method.to_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert (first.state, first.phases, first.work) == (again.state, again.phases, again.work)


# --- fakes ------------------------------------------------------------------------------------------------------------


class Keeper(nn.Module):
    """Keeps tensors in every way there is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        self.tied = self.weight
        self.register_buffer("buffer", torch.empty(2, dtype=BF16))
        self.plain = torch.empty(5).t()
        self.held = (("key", torch.empty(6)), [self.weight], {"deep": {"er": torch.empty(7)}})
        self.other, self.none, self.named = nn.Linear(2, 2), None, "weight"
        self.other.weight.requires_grad_(False)


def test_whatever_a_module_keeps_becomes_fake():
    with torch.device("meta"):
        model = Keeper()
    with fake_mode():
        make_fake(model)
        held = all_tensors(model)
        assert all(isinstance(t, FakeTensor) and t.device.type == "cpu" for t in held)
        assert {tuple(t.shape) for t in held} == {(3, 4), (2,), (5,), (6,), (7,), (2, 2)}
        assert model.tied is model.weight is model.held[1][0]
        assert isinstance(model.weight, nn.Parameter)
        assert model.buffer.dtype == BF16
        assert (model.weight.requires_grad, model.other.weight.requires_grad) == (True, False)
        assert (model.held[0][0], model.named, model.none) == ("key", "weight", None)
    assert not isinstance(torch.empty(1), FakeTensor)


def test_what_follows_from_the_rows_alone_is_known():
    with fake_mode():
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        assert not mask.bool().all()
        assert mask[:, :2].all()
        assert (torch.arange(3) * mask).sum(1).tolist() == [1, 3]
        assert torch.cat([torch.ones(2, 4, dtype=torch.int64), mask], dim=1).argmin(1).tolist() == [6, 0]


def test_a_model_comes_back_as_it_was():
    with torch.device("meta"):
        model = Keeper()
    before = [dict(vars(m), **m._parameters, **m._buffers) for m in model.modules()]
    with restore_module(model), fake_mode():
        make_fake(model)
        model.train(False).found_once = torch.empty(3)
    after = [dict(vars(m), **m._parameters, **m._buffers) for m in model.modules()]
    assert [{k: id(v) for k, v in each.items()} for each in after] == [
        {k: id(v) for k, v in each.items()} for each in before
    ]
    assert model.weight.is_meta
    assert model.training


def ran(x, n):
    """Return what came of operators, with whose storage each shares and how it is laid."""
    half, w = x.to(BF16), torch.empty(8, 6).t()
    made = [
        x * 2, n * 2, n * 2.0, n + True, x * w, half * 2, half @ half.t(), x.add_(1), x.t(), x[1:, ::2],
        *x.split(2), *x.max(dim=1), torch.cat([x, w]), torch.mm(x, x.t(), out=torch.empty(6, 6)), x.reshape(3, 16),
        torch.zeros(3), torch.zeros(3, dtype=BF16), x.view(-1, 2, 2).transpose(0, 1).reshape(2, -1), x.expand(2, 6, 8),
        x.gather(1, n[:, None] * 0), torch.empty_like(w), F.silu(half), x.new_zeros(2), *torch._foreach_mul([x, w], 2),
    ]  # fmt: skip
    storages = {}
    for t in (x, n, *made):
        storages.setdefault(t.untyped_storage()._cdata, len(storages))
    return [
        (t.shape, t.stride(), t.dtype, t.storage_offset(), t.untyped_storage().nbytes(), t.device, t is x,
         storages[t.untyped_storage()._cdata])
        for t in made
    ]  # fmt: skip


def test_what_is_remembered_is_what_fakes_make():
    def given():
        return torch.empty(6, 8), torch.empty(12, dtype=torch.int64)[::2]

    with FakeTensorMode():
        plain = ran(*given())
    with fake_mode():
        first, again = ran(*given()), ran(*given())
    assert first == again == plain
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with fake_mode():
            assert torch.zeros(3).dtype == torch.float64
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("time", ["first", "again"])  # then operators are remembered
def test_what_is_known_stays_so_until_it_is_overwritten(time):
    with fake_mode():
        known = torch.tensor([3, 1, 2])
        view, unknown = known[1:], torch.empty(2, dtype=torch.int64)
        assert (view + 1).tolist() == [2, 3]
        assert isinstance(unknown + view, FakeTensor)
        assert view.tolist() == [1, 2]
        view.copy_(unknown)
        for overwritten in (known, view, view + 1):
            with pytest.raises(DataDependentOutputException):
                overwritten.tolist()


@pytest.mark.parametrize(
    "ask", [lambda x: bool(x.any()), lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_what_hangs_on_values_is_said(ask):
    with pytest.raises(ModelError, match="hangs on values"), fake_mode():
        ask(torch.empty(3) + torch.arange(3))
