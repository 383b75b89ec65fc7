"""The counter of live storages: what counts, what does not, and that every byte given is taken back."""

from __future__ import annotations

import gc
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from slimtune.planning.storage import Storages

KB = 1024  # bytes of 256 numbers in fp32


def most(count):
    return max(count.peaks.values())


def made(**how):
    return torch.empty(256, **how)


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """Run with real tensors, and with fakes."""
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


pytestmark = pytest.mark.usefixtures("tensors")


def test_a_storage_counts_as_long_as_something_holds_it():
    with Storages() as count:
        a = made()
        b = made(dtype=torch.bfloat16)
        assert (count.total, most(count)) == (KB + KB // 2, KB + KB // 2)
        del b
        assert (count.total, most(count)) == (KB, KB + KB // 2)
        a = None
        assert (a, count.total) == (None, 0)


def test_views_and_changes_in_place_cost_nothing():
    with Storages() as count:
        a = made()
        b, c = a.view(16, 16).t(), a[3:9]
        a.add_(1)
        torch.add(a, 1, out=a)
        assert (count.total, most(count)) == (KB, KB)
        del a, b
        assert count.total == KB  # the slice holds the whole storage
        del c
        assert count.total == 0


def test_what_is_there_before_counts_once_it_is_held():
    a = made()
    with Storages() as count:
        assert count.total == 0
        count.hold([a, a.view(16, 16)], "weights")
        assert (count.total, count.now["weights"]) == (KB, KB)
        count.hold([a], "adapters")
        assert (count.total, count.now["weights"], count.now["adapters"]) == (KB, 0, KB)
        del a
        assert (count.total, count.now["adapters"]) == (0, 0)


def test_what_is_released_after_the_counting_is_taken_back_too():
    with Storages() as count:
        a = made()
    del a
    assert count.total == 0


def test_sizes_are_rounded_up_to_blocks():
    with Storages(block=512) as count:
        a, b, c = torch.empty(1), torch.empty(129), torch.empty(0)
        assert (len(a), len(b), len(c)) == (1, 129, 0)
        assert count.total == 512 + 1024


def test_logits_are_told_by_their_last_dimension():
    with Storages(vocabulary=100) as count:
        kept = torch.empty(4, 100), torch.empty(100), torch.empty(4, 99)
        assert {k: v for k, v in count.now.items() if v} == {"logits": 1600, "activations": 400 + 1584}
        assert count.at_peaks["start"] == count.now
        del kept
        assert count.at_peaks["start"] == {"logits": 1600, "activations": 1984}


def test_each_phase_has_its_peak():
    with Storages() as count:
        a = made()
        count.phase("one")
        b = made()
        del b
        count.phase("two")
        c = torch.empty(2)
        assert count.peaks == {"start": KB, "one": 2 * KB, "two": KB + 8}
        assert len(a) + len(c) == 258


def test_events_balance():
    """Every storage comes and goes with the same bytes, in between no total is below zero, and the peak is theirs."""
    with Storages(events=True) as count:
        w = nn.Parameter(torch.empty(16, 16))
        x = torch.empty(4, 16)
        for _ in range(3):
            F.gelu(x @ w).square().sum().backward()
            w.grad = None
        del x, w
        gc.collect()
    live, totals = {}, [0]
    for key, size in count.events:
        if size < 0:
            assert live.pop(key) == -size
        else:
            assert key not in live
            live[key] = size
        totals.append(totals[-1] + size)
    assert (live, totals[-1], min(totals), max(totals)) == ({}, 0, 0, most(count))


def test_what_autograd_keeps_counts_until_it_lets_go():
    with Storages() as count:
        w = nn.Parameter(torch.empty(16, 16))
        count.hold([w], "weights")
        h = torch.tanh(torch.tanh(w))  # the inner one is kept for the backward pass
        assert count.total == 3 * KB
        loss = h.sum()
        del h
        loss.backward()
        count.hold([w.grad], "gradients")
        del loss
        assert {k: v for k, v in count.now.items() if v} == {"weights": KB, "gradients": KB}


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("use", [lambda w: F.linear(w[:1].detach(), w), lambda w: 2 * w], ids=["view", "whole"])
def test_gradients_of_a_weight_used_again_are_summed_as_autograd_sums_them(use, calls):
    """In place where nothing else holds the sum, not even as its view: torch does it with real tensors alone."""

    def step():
        w = nn.Parameter(torch.empty(64, 64))
        sum(use(w).sum() for _ in range(calls)).backward()

    with Storages() as count:
        step()
    with _disable_current_modes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as real:
        step()
    sizes = [e.nbytes() for e in real.profiler.kineto_results.events() if e.name() == "[memory]"]
    size = 64 * 64 * 4
    assert round(most(count) / size) == round(max(accumulate(sizes)) / size)


def test_work_is_counted_by_operator():
    with Storages() as count:
        a, b = torch.empty(8, 16), torch.empty(16, 4)
        count.work.clear()
        for _ in range(2):
            a @ b
        a.t()
        (key, times), *none = count.work.items()
    assert (key, times, none) == ((2 * 8 * 16 * 4, 4 * (128 + 64 + 32), torch.float32), 2, [])
