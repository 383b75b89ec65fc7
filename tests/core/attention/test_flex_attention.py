"""Flex attention's mask for a tree of segments equals the dense mask, with few kernels for many lengths."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layouts
from reference import dense_mask
from torch.nn.attention import flex_attention as flex

from slimtune.core.attention import packed_attention
from slimtune.core.attention.packed_attention import (
    BLOCK,
    _compile,
    _find_kernel_options,
    _test_kernel,
    get_flex_block_mask,
    round_up_to_power_of_two_blocks,
    run_compiled_flex_attention,
    should_use_flex_attention,
)
from slimtune.core.attention.packed_layout import PackedLayout

CPU = torch.device("cpu")
HEADS = (CPU, torch.float32, 4, 2, 16)


def to_dense(mask):
    """What a kernel sees: all of full blocks, of partial ones what `mask_mod` says, of others nothing."""
    rows, columns = mask.seq_lengths
    partial_, full = torch.zeros(rows // BLOCK, columns // BLOCK), torch.zeros(rows // BLOCK, columns // BLOCK)
    for blocks, counts, order in (
        (partial_, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for r in range(len(blocks)):
            blocks[r, order[0, 0, r, : counts[0, 0, r]].long()] = 1
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    partial_, full = (b.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).bool() for b in (partial_, full))
    assert not (partial_ & full).any()
    return full | (partial_ & mask.mask_mod(None, None, q, k))


@settings(max_examples=60, deadline=None)
@given(layouts(12, 70, (0, 0, 3, 130)), st.sampled_from([None, 1, 5, 64, 200]))
def test_mask(layout, window):
    mask, expected = to_dense(get_flex_block_mask(layout, window, CPU)), dense_mask(layout, window)
    assert torch.equal(mask[: layout.total, : expected.shape[1]], expected)
    assert not mask[: layout.total, expected.shape[1] :].any()  # padding is not seen
    assert mask.any(1).all()  # a query that sees nothing would divide by zero


def test_blocks_between_rows_are_skipped():
    """16 rows of 256 tokens: 3 of the 2 × 2 blocks in each."""
    mask = get_flex_block_mask(PackedLayout((256,) * 16, (-1,) * 16), None, CPU)
    assert (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item() == 16 * 3
    assert mask.full_kv_num_blocks.sum() == 16


@pytest.mark.parametrize(("prefix_keys", "window"), [(0, None), (5, None), (0, 40)])
def test_uncompiled_attention(prefix_keys, window, monkeypatch):
    monkeypatch.setattr(packed_attention, "_compile", lambda function: function)
    layout = PackedLayout((150, 40, 90, 60), (-1, 0, 0, 1), prefix_keys)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 24) for heads, n in ((6, 340), (2, prefix_keys + 340), (2, prefix_keys + 340)))
    out = run_compiled_flex_attention(q, k, v, get_flex_block_mask(layout, window, CPU), 0.3)
    expected = F.scaled_dot_product_attention(q, k, v, dense_mask(layout, window), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.fixture
def compile_on_cpu(monkeypatch):
    """Compile to torch's operators, which have a backward pass on a CPU too; yields the counter of kernels."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    for cached in (_compile, _find_kernel_options):
        cached.cache_clear()
    yield counter
    for cached in (_compile, _find_kernel_options):
        cached.cache_clear()


def test_gradients_and_number_of_kernels(compile_on_cpu):
    for lengths, parents in [
        ((300, 20, 31), (-1, 0, 0)),
        ((300, 40), (-1, -1)),
        ((200, 201), (-1, 0)),
        ((600,), (-1,)),
        ((130, 9), (-1, 0)),
        ((400, 9), (-1, 0)),
    ]:
        layout = PackedLayout(lengths, parents)
        leaves = [torch.randn(1, heads, layout.total, 16, requires_grad=True) for heads in (4, 2, 2)]
        expected = F.scaled_dot_product_attention(*leaves, dense_mask(layout), enable_gqa=True)
        out = run_compiled_flex_attention(*leaves, get_flex_block_mask(layout, None, CPU), None)
        torch.testing.assert_close(out, expected)
        weights = torch.randn_like(expected)
        grads, expected_grads = (torch.autograd.grad(y, leaves, weights) for y in (out, expected))
        torch.testing.assert_close(grads, expected_grads)
    assert compile_on_cpu.frame_count == 3  # 512, 1024 and 256


def test_padded_length():
    assert [round_up_to_power_of_two_blocks(n) for n in (1, 128, 129, 256, 257, 5000)] == [
        128,
        128,
        256,
        256,
        512,
        8192,
    ]


def test_not_on_cpu():
    query = torch.zeros(1, 2, 512, 64)
    assert not should_use_flex_attention(query, query)


# --- the test of a kernel before its first use ------------------------------------------------------------------------


def test_kernel_that_works(compile_on_cpu):
    # Even if the caller is inside no_grad and saved-tensor hooks.
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: 1 / 0):
        assert _find_kernel_options(*HEADS) == {}


def test_kernel_with_wrong_values(compile_on_cpu, monkeypatch):
    other_mask = get_flex_block_mask(PackedLayout((166, 50, 40), (-1, 0, 1)), None, CPU)
    monkeypatch.setattr(packed_attention, "get_flex_block_mask", lambda *_: other_mask)
    assert "values" in _test_kernel(*HEADS, {})


def test_kernel_without_memory(monkeypatch):
    """Options with less shared memory are tried before attention by segment."""

    def fail(*_, kernel_options=None, **__):
        tried.append(kernel_options)
        raise RuntimeError("out of resource: shared memory\nRequired: 101888")

    tried = []
    monkeypatch.setattr(packed_attention, "_compile", lambda function: fail)
    _find_kernel_options.cache_clear()
    with pytest.warns(UserWarning, match=r"\b4 .*\b16 .*torch\.float32.*shared memory$"):
        assert _find_kernel_options(*HEADS) is None
    assert tried[:2] == [None, {"num_stages": 1}]
    assert len(tried) == 3
    _find_kernel_options.cache_clear()
