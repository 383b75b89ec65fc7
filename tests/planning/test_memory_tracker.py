"""MemoryTracker counts each storage while it is alive, by part and phase, on real and on fake tensors."""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from slimtune.core.foundation.device import counting_allocations_as_host
from slimtune.planning.memory_tracker import MemoryTracker

KB = 1024  # bytes of 256 numbers in fp32


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request):
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


def live(tracker):
    return {part: size for part, size in tracker.live.items() if size}


def test_storage_counts_until_the_last_reference_goes():
    with MemoryTracker() as tracker:
        a = torch.empty(256)
        view, part = a.view(16, 16).t(), a[3:9]
        a.add_(1)
        torch.add(a, 1, out=a)
        assert live(tracker) == {"activations": KB}
        del a, view
        assert live(tracker) == {"activations": KB}
        del part
        b = torch.empty(256, dtype=torch.bfloat16)
        assert live(tracker) == {"activations": KB // 2}
    del b
    assert (live(tracker), tracker.peak) == ({}, KB)


def test_assigned_tensors():
    a = torch.empty(256)
    with MemoryTracker() as tracker:
        assert live(tracker) == {}
        tracker.assign([a, a.view(16, 16)], "weights")
        assert live(tracker) == {"weights": KB}
        tracker.assign([a], "adapters")
        assert live(tracker) == {"adapters": KB}
        del a
        assert live(tracker) == {}


def test_blocks_logits_and_phases():
    with MemoryTracker(block=512, vocab_size=100) as tracker:
        a = torch.empty(1), torch.empty(129), torch.empty(0)
        tracker.start_phase("logits")
        b = torch.empty(4, 100), torch.empty(100), torch.empty(4, 99)
        tracker.start_phase("again")
        del b
    assert tracker.phases["start"] == {"activations": 512 + 1024}
    assert tracker.phases["logits"] == tracker.phases["again"] == {"activations": 1536 + 512 + 2048, "logits": 2048}
    del a


def test_host_allocations_count_apart():
    with MemoryTracker(separate_host=True) as tracker, counting_allocations_as_host():
        torch.empty(256)
    assert (tracker.host_peak, tracker.peak) == (KB, 0)


def test_tensors_saved_by_autograd():
    with MemoryTracker() as tracker:
        w = nn.Parameter(torch.empty(16, 16))
        tracker.assign([w], "weights")
        h = torch.tanh(torch.tanh(w))  # the inner result is saved for the backward pass
        assert sum(live(tracker).values()) == 3 * KB
        loss = h.sum()
        del h
        loss.backward()
        tracker.assign([w.grad], "gradients")
        del loss
        assert live(tracker) == {"weights": KB, "gradients": KB}


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("use", [lambda w: F.linear(w[:1].detach(), w), lambda w: 2 * w], ids=["view", "whole"])
def test_gradient_accumulation_is_in_place(use, calls):
    def step():
        w = nn.Parameter(torch.empty(64, 64))
        sum(use(w).sum() for _ in range(calls)).backward()

    with MemoryTracker() as tracker:
        step()
    with _disable_current_modes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as real:
        step()
    sizes = [e.nbytes() for e in real.profiler.kineto_results.events() if e.name() == "[memory]"]
    size = 64 * 64 * 4
    assert round(tracker.peak / size) == round(max(accumulate(sizes)) / size)


def test_work():
    with MemoryTracker(count_operators=True) as tracker:
        a, b = torch.empty(8, 16), torch.empty(16, 4)
        tracker.counts_by_operator_cost.clear()
        for _ in range(2):
            a @ b
        a.t()
    assert tracker.counts_by_operator_cost == {(2 * 8 * 16 * 4, 4 * (128 + 64 + 32), torch.float32): 2}


@pytest.mark.parametrize(
    ("tokens", "causal", "pairs"),
    [(24, False, 24**2), (24, True, 24**2), (512, True, 512**2), (1024, True, 512 * 512 + 512 * 1024)],
)
def test_fused_attention(tokens, causal, pairs):
    """Four operations for each pair of a query and a key, a head and its size; 2.5 times as many backward.

    Of a causal row the kernel computes whole blocks of 512 keys.
    """
    query, key, value = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    with MemoryTracker(count_operators=True) as tracker:
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
        forward = tracker.attention_flops_by_dtype.copy()
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.ones_like(out), query, key, value, out, logsumexp, 0.0, causal
        )
    assert forward == {torch.float32: 4 * 4 * 8 * pairs}
    assert tracker.attention_flops_by_dtype == {torch.float32: 14 * 4 * 8 * pairs}
