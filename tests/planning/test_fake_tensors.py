"""Operators on fake tensors are answered from what is known of their shapes, as FakeTensorMode answers them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from slimtune import LoraConfig
from slimtune.planning.fake_tensors import FakeOperators, fake_tensor_mode
from slimtune.planning.memory_trace import trace_training_step
from slimtune.planning.plan_request import MicroBatchWorkload

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "head_dim": 16,
}  # fmt: skip
BASES = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def make_job(family: str, **settings) -> MicroBatchWorkload:
    return MicroBatchWorkload(
        base_config=AutoConfig.for_model(family, **SIZES, **BASES[family]),
        method=LoraConfig(target_modules="all-linear"),
        dtype=torch.bfloat16,
        lengths=(160, 96),
        device="cuda",
        **settings,
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"quantization": "nf4"}),
        ("mixtral", {"gradient_checkpointing": True}),
        ("qwen3_5_text", {"packing": False}),
    ],
)
def test_known_results_are_those_of_fake_tensor_mode(monkeypatch, family, settings):
    known = trace_training_step(make_job(family, **settings))
    monkeypatch.setattr(FakeOperators, "find_result", lambda *_: NotImplemented)
    assert trace_training_step(make_job(family, **settings)) == known


def test_a_second_step_asks_fake_tensor_mode_for_few_operators(monkeypatch):
    asked, dispatch = [], FakeTensorMode.dispatch

    def count(self, func, *args, **kwargs):
        asked.append(func)
        return dispatch(self, func, *args, **kwargs)

    job = make_job("llama", micro_batches_per_step=8)
    trace_training_step(job)
    monkeypatch.setattr(FakeTensorMode, "dispatch", count)
    trace = trace_training_step(job)
    assert len(asked) < 0.08 * sum(trace.counts_by_operator_cost.values())


def test_values_follow_until_a_view_of_them_is_overwritten():
    with fake_tensor_mode():
        ids = torch.arange(6).view(2, 3)
        row = ids[1]
        assert (row * 2).tolist() == [6, 8, 10]
        row.copy_(torch.empty(3, dtype=torch.int64))
        assert (ids.constant, row.constant) == (None, None)


def test_an_operator_on_known_and_unknown_values_has_unknown_ones():
    with fake_tensor_mode():
        ids, table = torch.arange(4), torch.empty(8, 2)
        for _ in range(2):
            rows = torch.nn.functional.embedding(ids, table)
            assert (rows.shape, rows.constant) == ((4, 2), None)


def test_a_view_shares_memory_and_a_copy_does_not():
    with fake_tensor_mode():
        for _ in range(2):
            x = torch.empty(4, 8)
            view, copy = x[1:3].t(), x.clone()
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert (view.shape, view.stride(), view.storage_offset()) == ((8, 2), (1, 8), 8)
            assert copy.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert x.mul_(2) is x


def test_one_and_one_point_zero_are_two_arguments():
    with fake_tensor_mode():
        x = torch.empty(4, dtype=torch.int64)
        assert [(x * factor).dtype for factor in (1, 1.0, 1)] == [torch.int64, torch.float32, torch.int64]


def test_warnings_of_transformers_are_not_those_of_a_plan():
    level = transformers_logging.get_verbosity()
    with fake_tensor_mode():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    assert transformers_logging.get_verbosity() == level
