"""Packed = padded = each row alone, in loss and in logits, on small models with and without sliding windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from slimtune.attention.register import packed_attention
from slimtune.data.collator import Collator
from slimtune.errors import DataError
from slimtune.train_step.loss import step_loss, token_nll

V = 61
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
        )
        model = GPT2LMHeadModel(config)
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    elif name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4))
    else:
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        )
    for p in model.parameters():  # wider than the default, so that a leak between rows shows
        p.data += 0.2 * torch.randn_like(p)
    # Gemma 2 caps its attention scores, which sdpa does not.
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    return model.float().eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gemma3"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def example(length, supervised, seed=0):
    """`supervised`: positions of the learned tokens."""
    ids = torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [t if i in supervised else -100 for i, t in enumerate(ids)], "line": seed}


ROWS = [example(9, {4, 5, 8}, 1), example(13, set(range(13)), 2), example(2, {1}, 3), example(7, {3, 6}, 4)]


WAYS = {
    "laid": {"layout": True},
    "laid, nothing shared": {"layout": True, "share_prefix": False},
    "in a row": {},
    "padded": {"packing": False},
}


def loss_of(model, batch):
    with torch.no_grad(), packed_attention(model):
        return step_loss(model, batch).item()


def alone(model, rows):
    """Losses and logits of each row alone, by transformers' own loss."""
    outs = []
    with torch.no_grad():
        for one in rows:
            ids, labels = torch.tensor([one["input_ids"]]), torch.tensor([one["labels"]])
            outs.append(model(input_ids=ids, labels=labels, use_cache=False))
    return outs


def mean_alone(model, rows):
    counts = [sum(t != -100 for t in r["labels"][1:]) for r in rows]
    return sum(o.loss.item() * n for o, n in zip(alone(model, rows), counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("way", WAYS)
def test_loss_is_that_of_the_rows_alone(model, way):
    collator = Collator(0, **WAYS[way])
    assert loss_of(model, collator(ROWS)) == pytest.approx(mean_alone(model, ROWS), abs=1e-5)
    assert loss_of(model, collator(ROWS[:1])) == pytest.approx(alone(model, ROWS[:1])[0].loss.item(), abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_each_token_costs_what_it_costs_alone(model, way):
    batch = Collator(0, **WAYS[way])(ROWS)
    with torch.no_grad(), packed_attention(model):
        got = token_nll(model, batch)
    want = [
        -out.logits[0, t - 1].log_softmax(-1)[label]
        for one, out in zip(ROWS, alone(model, ROWS), strict=True)
        for t, label in enumerate(one["labels"])
        if t and label != -100
    ]
    torch.testing.assert_close(got, torch.stack(want), atol=2e-5, rtol=1e-4)


def test_with_the_cache_rows_see_each_other(llama):
    """Why the caller has to pass use_cache=False: if this ever fails, the warning can go."""
    batch = Collator(0)(ROWS)
    with torch.no_grad():
        out = llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
    last = out[0, -1] - alone(llama, ROWS[-1:])[0].logits[0, -1]
    assert last.abs().max() > 1e-3


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_lengths_and_masks(llama, data):
    rows = []
    for seed in range(data.draw(st.integers(1, 5))):
        length = data.draw(st.integers(1, 11))
        rows.append(example(length, data.draw(st.sets(st.integers(0, length - 1))), seed))
    rows.append(example(3, {2}, 9))
    losses = []
    for way in WAYS.values():
        batch = Collator(0, **way)(rows)
        assert all(v.dtype == torch.int64 for k, v in batch.items() if k != "layout")
        assert batch["logits_to_keep"].tolist() == sorted(set(batch["logits_to_keep"].tolist()))
        targets = [t for r in rows for t in r["labels"][1:] if t != -100]
        assert batch["targets"].tolist() == targets
        losses.append(loss_of(llama, batch))
    wanted = mean_alone(llama, [r for r in rows if any(t != -100 for t in r["labels"][1:])])
    assert losses == pytest.approx([wanted] * len(WAYS), abs=1e-5)


def test_packed_by_hand():
    a = {"input_ids": [11, 12, 13], "labels": [11, -100, 13]}  # a first token that is marked has nothing before it
    b = {"input_ids": [21, 22], "labels": [21, 22]}
    got = {k: v.tolist() for k, v in Collator(0)([a, b]).items()}
    assert got == {
        "input_ids": [[11, 12, 13, 21, 22]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "logits_to_keep": [1, 3],
        "hidden_index": [0, 1],
        "targets": [13, 22],
        "tokens": 5,
    }


def test_padded_by_hand():
    a = {"input_ids": [11, 12, 13], "labels": [-100, 12, 13]}
    b = {"input_ids": [21, 22], "labels": [-100, 22]}
    got = {k: v.tolist() for k, v in Collator(7, packing=False)([a, b]).items()}
    assert got == {
        "input_ids": [[11, 12, 13], [21, 22, 7]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "logits_to_keep": [0, 1],
        "hidden_index": [0, 1, 2],
        "targets": [12, 13, 22],
        "tokens": 5,
    }


def test_num_items_divides_the_sum(llama):
    batch = Collator(0)(ROWS)
    mean, count = step_loss(llama, batch), len(batch["targets"])
    torch.testing.assert_close(step_loss(llama, batch, 8), mean * count / 8)
    torch.testing.assert_close(step_loss(llama, batch, torch.tensor(8)), mean * count / 8)


def test_a_batch_without_a_target_is_refused():
    with pytest.raises(DataError, match=r"no supervised token \(rows of lines 5, 6\)"):
        Collator(0)([example(4, set(), 5), example(4, {0}, 6)])
