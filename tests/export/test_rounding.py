"""Rounding to 16 bits with inputs in sight: closer products, numbers that 16 bits hold, and nothing else changed."""

from __future__ import annotations

import torch
from hand_run import make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import slimtune.export.merge as room
import slimtune.export.rounding as rounding_room
from slimtune.export.merge import merge
from slimtune.export.rounding import Rounding, compensated


def products_apart(q, w, x):
    return ((q.double() - w.double()) @ x.double().t()).square().sum().item()


def alike(n, width, seed):
    """Inputs of which a few directions carry most, as a layer's do."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(n, 4, generator=g) @ torch.randn(4, width, generator=g)
    return few + 0.1 * torch.randn(n, width, generator=g)


@given(st.integers(1, 40), st.integers(2, 150), st.integers(1, 200), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=25, deadline=None)
def test_products_stay(out, width, n, dtype):
    g = torch.Generator().manual_seed(out * width)
    weight, x = torch.randn(out, width, generator=g), alike(n, width, n)
    found = compensated(weight, x, dtype)
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert products_apart(found, weight, x) <= products_apart(weight.to(dtype), weight, x) * 1.01
    # No number moves farther than rounding itself could, by much.
    assert (found.float() - weight).abs().max() <= 0.05 * weight.abs().max()


def test_where_inputs_are_alike_little_is_lost():
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), alike(512, 128, 2)
    lost = products_apart(compensated(weight, x, torch.bfloat16), weight, x)
    assert lost < 0.1 * products_apart(weight.bfloat16(), weight, x)


def test_what_needs_no_rounding_is_left():
    held = torch.randn(8, 16).bfloat16().float()
    rounding = Rounding({"a": torch.randn(32, 16)})
    assert torch.equal(rounding("a.weight", held, torch.bfloat16).float(), held)
    odd = torch.randn(8, 16)
    assert torch.equal(rounding("b.weight", odd, torch.bfloat16), odd.bfloat16())  # no inputs of it
    assert torch.equal(rounding("a.weight", odd, torch.bfloat16), odd.bfloat16())  # few
    assert torch.equal(rounding("a.bias", odd[0], torch.bfloat16), odd[0].bfloat16())


def test_a_transposed_map_is_rounded_alike():
    weight, x = torch.randn(8, 16), alike(256, 16, 3)
    plain, turned = Rounding({"a": x}), Rounding({"a": x}, ["a"])
    assert torch.equal(turned("a.weight", weight.t(), torch.bfloat16), plain("a.weight", weight, torch.bfloat16).t())


def test_a_merge_into_bfloat16_is_nearer(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    base = tmp_path / "base"
    tiny_llama().bfloat16().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    run = make_run(tmp_path / "run", base, model={"dtype": "bfloat16"})
    monkeypatch.setattr(rounding_room, "LEAST", 1)
    ours = merge(run, tmp_path / "ours")
    monkeypatch.setattr(room, "rounding_for", lambda *_: Rounding({}))
    nearest = merge(run, tmp_path / "nearest")
    assert ours["mean_difference"] < nearest["mean_difference"]
    a, b = (load_file(tmp_path / way / "model.safetensors") for way in ("ours", "nearest"))
    changed = {n for n in a if not torch.equal(a[n], b[n])}
    assert changed
    assert all(n.endswith("weight") and a[n].dim() == 2 for n in changed)
