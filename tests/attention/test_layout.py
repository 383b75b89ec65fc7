"""What each token of a laid sequence sees: token by token, by segment, and as one dense mask."""

from unittest.mock import patch

import models_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaAttention

from slimtune.attention import packed_attention
from slimtune.attention import register as room
from slimtune.attention.packed_layout import PackedLayout
from slimtune.attention.register import LAYOUT_KWARG

CPU = torch.device("cpu")
TREE = PackedLayout((5, 3, 2, 4, 1, 6), (-1, 0, 1, 0, -1, 4))
"""A beginning of 5, below it 3 and 4, below the 3 another 2; a beginning of 1, below it 6."""


@st.composite
def layouts(draw):
    lengths = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=7)))
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(len(lengths)))
    return PackedLayout(lengths, parents, draw(st.sampled_from([0, 0, 1, 4])))


windows = st.none() | st.integers(1, 12)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- who sees whom ----------------------------------------------------------------------------------------------------


def seen_by_hand(layout, window):
    """Walk from each token back to its row's beginning, then over the learned keys."""
    first = [sum(layout.lengths[:i]) for i in range(len(layout.lengths))]
    rows = []
    for i, n in enumerate(layout.lengths):
        for t in range(n):
            way, at, last = [], i, t
            while at >= 0:
                way += [layout.prefix_keys + first[at] + u for u in range(last, -1, -1)]
                at = layout.parents[at]
                last = layout.lengths[at] - 1
            way += range(layout.prefix_keys - 1, -1, -1)
            rows.append(set(way[:window]))
    return rows


@given(layout=layouts(), window=windows)
def test_seen(layout, window):
    seen = layout.dense_mask(window, CPU)
    assert seen.shape == (layout.total, layout.prefix_keys + layout.total)
    assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == seen_by_hand(layout, window)


@given(layout=layouts(), window=windows)
def test_masks_by_segment(layout, window):
    """Each segment's mask over `[keys before, segments above, own]` is the dense one's part; nothing else is seen."""
    seen, first = layout.dense_mask(window, CPU), [sum(layout.lengths[:i]) for i in range(len(layout.lengths))]
    for i, n in enumerate(layout.lengths):
        columns = list(range(layout.prefix_keys))
        for a in [*layout.ancestors(i), i]:
            columns += [layout.prefix_keys + first[a] + t for t in range(layout.lengths[a])]
        own = seen[first[i] : first[i] + n]
        mask = layout.segment_mask(i, window, torch.float32, CPU)
        if mask is None:
            assert torch.equal(own[:, columns], torch.ones(n, n, dtype=torch.bool).tril())
        else:
            assert mask.shape == (1, 1, n, len(columns))
            assert torch.equal(own[:, columns], mask[0, 0] == 0)
            assert set(mask[0, 0][~own[:, columns]].tolist()) <= {torch.finfo(torch.float32).min}
        elsewhere = [c for c in range(seen.shape[1]) if c not in columns]
        assert not own[:, elsewhere].any()


def test_by_hand():
    assert TREE.total == 21
    assert TREE.ancestors(2) == [0, 1]
    assert TREE.starts() == [0, 5, 8, 5, 0, 1]
    assert TREE.positions() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6]
    assert PackedLayout((3,), (-1,)).dense_mask(2, CPU).tolist() == [
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


@given(layout=layouts(), n=st.integers(1, 4), window=windows)
def test_behind_keys_and_behind_tokens(layout, n, window):
    """Learned keys and learned tokens before all rows are seen alike, and the tokens are laid first."""
    keys, tokens = layout.with_prefix_keys(n), layout.with_leading_tokens(n)
    assert tokens.total == layout.total + n
    assert keys.prefix_keys == layout.prefix_keys + n
    at = [layout.prefix_keys + n + t for t in range(layout.total)]  # columns: keys before, n tokens, the rest
    assert torch.equal(tokens.dense_mask(window, CPU)[n:][:, at], keys.dense_mask(window, CPU)[:, at])
    assert tokens.dense_mask(window, CPU)[n:].sum(1).tolist() == keys.dense_mask(window, CPU).sum(1).tolist()
    assert (
        keys.segment_mask(0, window, torch.float32, CPU) is None
        or keys.segment_mask(0, window, torch.float32, CPU).shape[3] > n
    )


@pytest.mark.parametrize("parents", [(-1, 1), (0, 0), (-1, -2), (-1,)])
def test_no_tree(parents):
    with pytest.raises(AssertionError):
        PackedLayout((2, 2), parents)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(chosen, layout, window, q, k, v):
    module = LlamaAttention(tf.LlamaConfig(**zoo.DECODER), 0).eval()
    given = {LAYOUT_KWARG: layout, "scaling": 0.3, "sliding_window": window, "dropout": 0.0}
    return room._attend(chosen, module, q, k, v, None, **given)[0]


def inputs(layout, dtype=torch.float64):
    keys = layout.prefix_keys + layout.total
    shapes = (1, 4, layout.total, 16), (1, 2, keys, 16), (1, 2, keys, 16)
    return [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def dense(layout, window, q, k, v):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, layout.dense_mask(window, CPU), scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
@settings(max_examples=40)
@given(layout=layouts(), window=windows)
def test_attention_by_segment_is_that_of_the_dense_mask(chosen, layout, window):
    given = inputs(layout)
    # transformers' eager softmax is in fp32.
    rtol = {"rtol": 1e-11, "atol": 1e-12} if chosen == "sdpa" else {"rtol": 1e-5, "atol": 1e-5}
    got, want = attention(chosen, layout, window, *given), dense(layout, window, *given)
    torch.testing.assert_close(got, want, **rtol)
    weights = normal(*want.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), given) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **rtol)


@settings(max_examples=10)
@given(layout=layouts(), window=windows)
def test_flex_attention_is_attention_by_segment(layout, window):
    """As on a GPU, but not compiled: forwards alone."""
    given = [t.detach() for t in inputs(layout, torch.float32)]
    want = attention("sdpa", layout, window, *given)
    with (
        patch.object(room, "flex_attention_supported", return_value=True),
        patch.object(packed_attention, "_compile", lambda function: function),
        patch.object(room, "attend_by_segment", side_effect=AssertionError("not by flex attention")),
    ):
        got = attention("sdpa", layout, window, *given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_bf16_on_a_cpu_is_attended_in_fp32():
    given = [t.detach().bfloat16() for t in inputs(TREE)]
    got = attention("sdpa", TREE, None, *given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, dense(TREE, None, *(t.float() for t in given)).bfloat16())
