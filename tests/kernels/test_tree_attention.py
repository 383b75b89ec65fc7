"""Flex attention's mask for a tree of segments: the layout's own, token by token, and few kernels for many lengths."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from slimtune.attention import packed_attention
from slimtune.attention.packed_attention import (
    BLOCK,
    _compile,
    _find_kernel_options,
    _test_kernel,
    flex_attention_supported,
    make_tree_mask,
    padded_length,
)
from slimtune.attention.packed_layout import PackedLayout

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    n = draw(st.integers(1, 12))
    lengths = tuple(draw(st.integers(1, 70)) for _ in range(n))
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(n))
    return PackedLayout(lengths, parents, draw(st.sampled_from([0, 0, 3, 130])))


def mask_of(layout, window=None):
    return make_tree_mask(layout.lengths, layout.parents, layout.positions(), layout.prefix_keys, window, CPU)


def dense(mask):
    """What a kernel sees: of whole blocks all, of those taken in part what `mask_mod` says, of others nothing."""
    rows, columns = mask.seq_lengths
    some, whole = torch.zeros(rows // BLOCK, columns // BLOCK), torch.zeros(rows // BLOCK, columns // BLOCK)
    for blocks, counts, order in (
        (some, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for r in range(len(blocks)):
            blocks[r, order[0, 0, r, : counts[0, 0, r]].long()] = 1
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    some, whole = (b.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).bool() for b in (some, whole))
    assert not (some & whole).any()
    return whole | (some & mask.mask_mod(None, None, q, k))


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([None, 1, 5, 64, 200]))
def test_the_mask_is_the_layouts(layout, window):
    got, want = dense(mask_of(layout, window)), layout.dense_mask(window, CPU)
    assert torch.equal(got[: layout.total, : want.shape[1]], want)
    assert not got[: layout.total, want.shape[1] :].any()  # nobody sees what is filled in
    assert got.any(1).all()  # a query that sees nothing would divide by nothing


def test_blocks_that_nobody_sees_are_left_out():
    """16 rows of 256 tokens: 3 blocks each of 2 × 2, and none between rows."""
    mask = mask_of(PackedLayout((256,) * 16, (-1,) * 16))
    assert (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item() == 16 * 3
    assert mask.full_kv_num_blocks.sum() == 16


@pytest.mark.parametrize(("front", "window"), [(0, None), (5, None), (0, 40)])
def test_attention_is_that_of_the_dense_mask(front, window, monkeypatch):
    monkeypatch.setattr(packed_attention, "_compile", lambda function: function)
    layout = PackedLayout((150, 40, 90, 60), (-1, 0, 0, 1), front)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 340, 24), torch.randn(1, 2, front + 340, 24), torch.randn(1, 2, front + 340, 24)
    got = packed_attention.tree_attention(q, k, v, mask_of(layout, window), 0.3)
    seen = layout.dense_mask(window, CPU)[None, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want)


def by_operators(monkeypatch, backend):
    """Compile to torch's operators, which have a backward pass on a CPU too."""
    torch._dynamo.reset()
    _compile.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)


def test_gradients_and_kernels(monkeypatch):
    """Lengths and trees that change every step compile once a power of two; the gradient is the dense mask's."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    by_operators(monkeypatch, counter)
    for lengths, parents in [
        ((300, 20, 31), (-1, 0, 0)),
        ((300, 40), (-1, -1)),
        ((200, 201), (-1, 0)),
        ((600,), (-1,)),
        ((130, 9), (-1, 0)),
        ((400, 9), (-1, 0)),
    ]:
        layout = PackedLayout(lengths, parents)
        n = layout.total
        leaves = [torch.randn(1, h, n, 16, requires_grad=True) for h in (4, 2, 2)]
        want = torch.nn.functional.scaled_dot_product_attention(
            *leaves, layout.dense_mask(None, CPU)[None, None], enable_gqa=True
        )
        got = packed_attention.tree_attention(*leaves, mask_of(layout), None)
        torch.testing.assert_close(got, want)
        weights = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 3  # 512, 1024 and 256
    _compile.cache_clear()


def test_lengths_are_powers_of_two():
    assert [padded_length(n) for n in (1, 128, 129, 256, 257, 5000)] == [128, 128, 256, 256, 512, 8192]


def test_a_cpu_computes_by_segment():
    query = torch.zeros(1, 2, 512, 64)
    assert not flex_attention_supported(query, query)


# --- before a kind of heads is computed so ----------------------------------------------------------------------------

HEADS = (CPU, torch.float32, 4, 2, 16)


@pytest.fixture
def uncompiled(monkeypatch):
    by_operators(monkeypatch, "aot_eager")
    _find_kernel_options.cache_clear()
    yield
    _find_kernel_options.cache_clear()
    _compile.cache_clear()


def test_what_works_has_no_fault(uncompiled):
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: 1 / 0):
        assert _find_kernel_options(*HEADS) == {}  # whatever the caller is in the middle of


def test_other_numbers_are_a_fault(uncompiled, monkeypatch):
    right = packed_attention.make_tree_mask
    monkeypatch.setattr(
        packed_attention, "make_tree_mask", lambda lengths, parents, *rest: right(lengths, (-1, 0, 1), *rest)
    )
    assert "its values are" in _test_kernel(*HEADS, {})


def test_less_memory_is_tried_before_segments(monkeypatch):
    def out_of_memory(*_, kernel_options=None, **__):
        tried.append(kernel_options)
        raise RuntimeError("out of resource: shared memory\nRequired: 101888")

    tried = []
    monkeypatch.setattr(packed_attention, "_compile", lambda function: out_of_memory)
    _find_kernel_options.cache_clear()
    with pytest.warns(
        UserWarning, match=r"4 heads of size 16 in torch.float32.*RuntimeError: out of resource: shared memory$"
    ):
        assert _find_kernel_options(*HEADS) is None
    assert tried[:2] == [None, {"num_stages": 1}]
    assert len(tried) == 3
    _find_kernel_options.cache_clear()


def test_compiled_once():
    assert _compile(flex.flex_attention) is _compile(flex.flex_attention)
