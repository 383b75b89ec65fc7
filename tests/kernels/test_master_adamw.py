"""AdamW on fp32 masters: torch's own in fp32, and what bf16 alone would lose is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimtune.kernels.master_adamw import MasterAdamW


def grads(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_in_fp32_it_is_torchs_own():
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = MasterAdamW([mine], lr=1e-2, weight_decay=0.1)
    torchs = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(5):
        grads([mine], step)
        grads([theirs], step)
        ours.step()
        torchs.step()
    assert torch.equal(mine, theirs)
    assert "master" not in ours.state[mine]


def test_steps_below_what_bf16_tells_apart_add_up():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # A hundred steps of 1e-4, each of which a bf16 weight of 1 would round away.
    assert optimizer.state[weight]["master"].mean().item() == pytest.approx(0.99, abs=1e-4)
    assert weight.float().mean().item() == pytest.approx(0.99, abs=0.004)
    assert weight.dtype == torch.bfloat16


def test_a_state_is_taken_up_without_rounding():
    made = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    first, second = (MasterAdamW([p], lr=1e-4) for p in made)
    grads(made[:1], 0)
    first.step()
    second.load_state_dict(first.state_dict())
    left, right = first.state[made[0]], second.state[made[1]]
    assert {k: v.dtype for k, v in right.items()} == dict.fromkeys(left, torch.float32)
    assert all(torch.equal(left[k], right[k]) for k in left)
    grads(made[:1], 1)
    first.step()
    assert not torch.equal(left["master"], right["master"])  # a copy, not the same tensor
