"""The step's gradients are the plain ones: fused, packed, prefixes shared, in several micro-batches, checkpointed.

The plain way is each row alone through the model's own forward and loss, LoRA as PEFT computes it, operator by operator
(reference.py). Compared: ‖a − b‖ / ‖b‖ of each trained tensor, the largest of which the last test prints.
"""

import random
from contextlib import nullcontext

import models_zoo as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    compute_in_float64,
    enlarge_weights,
    get_gradients,
    largest_relative_error,
    loss_of_separate_rows,
    row,
    unfused_lora,
)
from torch import nn

import slimtune
from slimtune.core.adapters.adapted_layer import AdaptedLayerMixin
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_step_loss

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
WAYS = {
    "packed": {"share_prefix": False},
    "shared": {},
    "micro-batches": {"max_tokens": 24},
    "micro-batches, nothing shared": {"max_tokens": 24, "share_prefix": False},
}
WORST: dict[tuple[str, torch.dtype], float] = {}

NAMES = ["llama", "qwen2", "gemma2", "gemma3", "gpt2"]
every_model = pytest.mark.parametrize("name", NAMES)
every_model_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in NAMES] + [(name, torch.float32) for name in ("llama", "gemma2")],
    ids=lambda value: str(value).removeprefix("torch."),
)
"""Every model in fp64; in fp32 one whose attention is fused, and one that is eager."""


def build(name, dtype, *, r=4, alpha=5, drop=0.0):
    model = getattr(zoo, name)(dtype=dtype)
    if name == "gemma2":  # it caps its attention scores, which sdpa does not
        model.set_attn_implementation("eager")
    for module in model.modules():  # GPT-2's own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    enlarge_weights(model)
    config = slimtune.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=drop, target_modules="all-linear")
    return zoo.shake(slimtune.get_peft_model(model, config)).train()


def computing_in(dtype):
    return compute_in_float64() if dtype == torch.float64 else nullcontext()


def some(n, seed):
    return random.Random(seed).choices(range(3, zoo.VOCAB), k=n)


def backward(model, rows, **sizes):
    """Run the micro-batches of one step backward, as training does; return their number."""
    batches = Collator(0, with_packed_layout=True, **sizes).make_micro_batches(rows)
    total = sum(len(b["targets"]) for b in batches)
    with using_packed_attention(model) as supported:
        assert supported
        for batch in batches:
            compute_step_loss(model, batch, total).backward()
    return len(batches)


def assert_near(way, dtype, gradient, expected):
    error = largest_relative_error(gradient, expected)
    WORST[way, dtype] = max(error, WORST.get((way, dtype), 0))
    assert error < BOUNDS[dtype], way


def plain_gradients(model, rows):
    with unfused_lora():
        return get_gradients(model, lambda: loss_of_separate_rows(model, rows).backward())


def assert_every_way(model, dtype, rows):
    with computing_in(dtype):
        expected = plain_gradients(model, rows)
        assert_near(
            "fused", dtype, get_gradients(model, lambda: loss_of_separate_rows(model, rows).backward()), expected
        )
        for way, sizes in WAYS.items():
            assert_near(way, dtype, get_gradients(model, lambda sizes=sizes: backward(model, rows, **sizes)), expected)


# --- rows with common prefixes, by hand -------------------------------------------------------------------------------

PROMPT, OTHER = some(11, 1), some(13, 2)
ANSWERS = [PROMPT + some(n, 10 + n) for n in (6, 1, 4)]
NESTED = [PROMPT + OTHER[: 9 * n] + some(3, 20 + n) for n in (0, 1, 2)] + [PROMPT + some(5, 30)]
CASES = {
    "answers to one prompt": [row(ids, range(11, 20)) for ids in ANSWERS],
    "a prefix of another": [row(ANSWERS[0], {12, 15, 16}), row(ANSWERS[0][:14], {9, 12, 13})],
    "identical rows": [row(ANSWERS[0], {5, 12, 14})] * 2 + [row(ANSWERS[0], {12, 13, 16})],
    "nested prefixes": [row(ids, range(11, 40)) for ids in NESTED],
    "learned inside": [row(ids, {3, 4, 7, 10, 11}) for ids in ANSWERS] + [row(OTHER, range(13))],
}


@every_model_and_dtype
@pytest.mark.parametrize("case", CASES)
def test_common_prefixes(case, name, dtype):
    batch = Collator(0, with_packed_layout=True)(CASES[case])
    assert batch["input_ids"].shape[1] < int(batch["tokens"])
    assert_every_way(build(name, dtype), dtype, CASES[case])


def test_nested_prefixes_make_a_tree_and_several_micro_batches():
    model, rows = build("llama", torch.float32), CASES["nested prefixes"]
    layout = Collator(0, with_packed_layout=True)(rows)["layout"]
    assert max(len(layout.ancestors(i)) for i in range(len(layout.lengths))) == 3
    assert backward(model, rows) == 1
    assert backward(model, rows, **WAYS["micro-batches"]) > 1


@every_model
def test_what_is_compared_is_fused_here_and_plain_there(name):
    model = build(name, torch.float32)

    def count_fused():
        nodes, seen = [loss_of_separate_rows(model, [row(PROMPT, range(11))]).grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [before for before, _ in node.next_functions]
        return sum("LowRank" in node.name() for node in seen)

    assert count_fused() == sum(isinstance(m, AdaptedLayerMixin) for m in model.modules())
    with unfused_lora():
        assert count_fused() == 0


def test_wrong_layout_would_show():
    """The bounds are far below what one token in sight of too much changes."""
    model, rows = build("llama", torch.float32), CASES["answers to one prompt"]
    expected = get_gradients(model, lambda: loss_of_separate_rows(model, rows).backward())
    batch = Collator(0, with_packed_layout=True)(rows)
    assert batch["layout"].parents == (-1, 0, 0, 0)
    batch["layout"] = PackedLayout(batch["layout"].lengths, (-1, 0, 1, 0))
    with using_packed_attention(model):
        assert (
            largest_relative_error(get_gradients(model, lambda: compute_step_loss(model, batch).backward()), expected)
            > 1e-2
        )


# --- any rows ---------------------------------------------------------------------------------------------------------


@st.composite
def trees(draw):
    """Rows of which some continue the prefix of an earlier one."""
    rows = []
    for n in range(draw(st.integers(1, 6))):
        seed = draw(st.integers(0, 999))
        if n and draw(st.booleans()):
            start = draw(st.sampled_from(rows))["input_ids"]
            ids = start[: draw(st.integers(min(8, len(start)), len(start)))] + some(draw(st.integers(0, 9)), seed)
        else:
            ids = some(draw(st.integers(4, 24)), seed)
        learned = {t for t in range(len(ids)) if random.Random(f"{seed} {t}").random() < 0.5}
        rows.append(row(ids, learned | {len(ids) - 1}))
    # One row that attends and learns, so that no gradient is zero and its rounding all there is to compare.
    return [*rows, row(some(12, 7), range(4, 12))]


@every_model_and_dtype
@settings(max_examples=5, derandomize=True)  # rounding has a tail: of 400 examples in fp32 the largest is 3e-6
@given(rows=trees(), r=st.integers(1, 8), scale=st.floats(0.2, 2))
def test_any_rows(name, dtype, rows, r, scale):
    assert_every_way(build(name, dtype, r=r, alpha=r * scale), dtype, rows)


# --- dropout and activation checkpointing -----------------------------------------------------------------------------


@every_model_and_dtype
@settings(max_examples=4, derandomize=True)
@given(seed=st.integers(0, 999), r=st.integers(1, 8), drop=st.sampled_from([0.1, 0.5]))
def test_fused_dropout(name, dtype, seed, r, drop):
    model, rows = build(name, dtype, r=r, drop=drop), [row(some(15, seed), range(5, 15))]

    def run():
        torch.manual_seed(seed)
        loss_of_separate_rows(model, rows).backward()

    with computing_in(dtype):
        with unfused_lora():
            expected = get_gradients(model, run)
        state = torch.get_rng_state()
        assert_near("fused, dropout", dtype, get_gradients(model, run), expected)
        assert torch.equal(torch.get_rng_state(), state)  # and what is drawn next is the same, too
        model.eval()
        assert largest_relative_error(get_gradients(model, run), expected) > 1e-3


@every_model_and_dtype
@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpointed(name, dtype, drop):
    model, rows = build(name, dtype, drop=drop), CASES["nested prefixes"]

    def run():
        torch.manual_seed(3)
        backward(model, rows)

    with computing_in(dtype):
        expected = get_gradients(model, run) if drop else plain_gradients(model, rows)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        layer = next(m for m in model.modules() if isinstance(m, AdaptedLayerMixin))
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        assert_near("checkpointed", dtype, get_gradients(model, run), expected)
        handle.remove()
        assert len(calls) == 2  # forward, and again backward


def test_worst(capsys):
    with capsys.disabled():
        print("\nlargest ‖a − b‖ / ‖b‖ of a trained tensor's gradient, to that of the plain way:")
        for (way, dtype), error in sorted(WORST.items(), key=str):
            print(f"    {way:32s} {str(dtype).removeprefix('torch.'):8s} {error:.1e}")
    assert all(error < BOUNDS[dtype] for (_, dtype), error in WORST.items())
