"""Which keys each token of a packed layout attends to, and attention under that mask."""

from unittest.mock import patch

import models_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import TREE, layouts, windows
from reference import dense_mask
from transformers.models.llama.modeling_llama import LlamaAttention

from slimtune.core.attention import attention_functions as register
from slimtune.core.attention import packed_attention
from slimtune.core.attention.attention_functions import LAYOUT_KWARG
from slimtune.core.attention.packed_layout import PackedLayout

CPU = torch.device("cpu")


@given(layout=layouts(), window=windows)
def test_segment_masks(layout, window):
    """Each segment's mask over the keys of its path is a part of the dense one, which has nothing else."""
    dense = dense_mask(layout, window)
    assert layout.count_pairs(window) == dense.sum()
    for segment in packed_attention.list_segments(layout, window, torch.float32, CPU):
        rows = dense[segment.start : segment.start + segment.length]
        columns = [k for first, n in segment.key_ranges for k in range(first, first + n)]
        assert rows.sum() == rows[:, columns].sum()
        mask = segment.mask
        if mask is None:
            assert torch.equal(rows[:, columns], torch.ones(segment.length, segment.length, dtype=torch.bool).tril())
        else:
            assert torch.equal(rows[:, columns], mask[0, 0] == 0)
            assert set(mask[0, 0][~rows[:, columns]].tolist()) <= {torch.finfo(torch.float32).min}


def test_numbers_of_a_tree():
    assert TREE.total == 21
    assert TREE.ancestors(2) == [0, 1, 2]
    assert TREE.positions() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6]


@given(layout=layouts(), n=st.integers(1, 4), window=windows)
def test_prefix_keys_equal_leading_tokens(layout, n, window):
    keys, tokens = dense_mask(layout.with_prefix_keys(n), window), layout.with_shared_prefix(n)
    assert tokens.positions()[n:] == [p + n for p in layout.positions()]
    assert torch.equal(dense_mask(tokens, window)[n:, layout.num_prefix_keys :], keys[:, layout.num_prefix_keys :])


@pytest.mark.parametrize("parents", [(-1, 1), (0, 0), (-1, -2), (-1,)])
def test_no_tree(parents):
    with pytest.raises(AssertionError):
        PackedLayout((2, 2), parents)


# --- attention --------------------------------------------------------------------------------------------------------


def attend(implementation, layout, window, q, k, v):
    module = LlamaAttention(tf.LlamaConfig(**zoo.DECODER), 0).eval()
    options = {LAYOUT_KWARG: layout, "scaling": 0.3, "sliding_window": window, "dropout": 0.0}
    return register._attend(implementation, module, q, k, v, None, **options)[0]


def random_inputs(layout, dtype=torch.float64):
    generator, keys = torch.Generator().manual_seed(0), layout.num_prefix_keys + layout.total
    shapes = (1, 4, layout.total, 16), (1, 2, keys, 16), (1, 2, keys, 16)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def dense_attention(layout, window, q, k, v):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, dense_mask(layout, window), scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@settings(max_examples=40)
@given(layout=layouts(), window=windows, part=st.sampled_from((3, 128)), threads=st.sampled_from((1, 8)))
def test_attention_by_segment(implementation, layout, window, part, threads):
    """Also split into parts of 3 tokens, and with more threads than there are heads of the keys."""
    inputs = random_inputs(layout)
    # transformers' eager softmax is in fp32.
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if implementation == "sdpa" else {"rtol": 1e-5, "atol": 1e-5}
    expected = dense_attention(layout, window, *inputs)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    with patch.object(packed_attention, "PART", part), patch("torch.get_num_threads", return_value=threads):
        out = attend(implementation, layout, window, *inputs)
        grads, expected_grads = (torch.autograd.grad((y * weights).sum(), inputs) for y in (out, expected))
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(grads, expected_grads, **tolerance)


@settings(max_examples=10)
@given(layout=layouts(), window=windows)
def test_flex_attention_equals_attention_by_segment(layout, window):
    """As on a GPU, but not compiled, and forwards only."""
    inputs = [t.detach() for t in random_inputs(layout, torch.float32)]
    expected = attend("sdpa", layout, window, *inputs)
    with (
        patch.object(register, "should_use_flex_attention", return_value=True),
        patch.object(packed_attention, "_compile", lambda function: function),
        patch.object(register, "attend_by_segment_on_cpu", side_effect=AssertionError("not by flex attention")),
    ):
        out = attend("sdpa", layout, window, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_computed_in_fp32_on_cpu():
    inputs = [t.detach().bfloat16() for t in random_inputs(TREE)]
    out = attend("sdpa", TREE, None, *inputs)
    assert torch.equal(out, dense_attention(TREE, None, *(t.float() for t in inputs)).bfloat16())
