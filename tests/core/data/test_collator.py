"""Packed = padded = each row alone, in loss and in logits, on small models with and without sliding windows."""

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.data.collator import Collator
from slimtune.core.training.loss import compute_step_loss, compute_supervised_token_nll
from slimtune.errors import DataError

V = 61
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SHAPE = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
LAYERS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2_SHAPE, bos_token_id=1, eos_token_id=2)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SHAPE, sliding_window=4)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=LAYERS)),
}
COLLATORS = {
    "layout": Collator(0, with_packed_layout=True),
    "layout, nothing shared": Collator(0, with_packed_layout=True, share_prefix=False),
    "packed": Collator(0),
    "padded": Collator(0, packing=False),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():  # wider than the default, so that a leak between rows shows
        p.data += 0.2 * torch.randn_like(p)
    # Gemma 2 caps its attention scores, which sdpa does not.
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    return model.float().eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def example(length, supervised, seed=0):
    """Make a row of random tokens, learned at the positions `supervised`."""
    ids = torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [t if i in supervised else -100 for i, t in enumerate(ids)], "line": seed}


ROWS = [example(9, {4, 5, 8}, 1), example(13, set(range(13)), 2), example(2, {1}, 3), example(7, {3, 6}, 4)]


def nll_of_each_row(model, rows):
    """The losses of the supervised tokens, from transformers' logits of each row alone."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            labels = enumerate(row["labels"])
            found += [-logits[t - 1].log_softmax(-1)[label] for t, label in labels if t and label != -100]
    return torch.stack(found)


@pytest.mark.parametrize("name", COLLATORS)
def test_loss_is_that_of_the_rows_alone(model, name):
    expected = nll_of_each_row(model, ROWS)
    batch = COLLATORS[name](ROWS)
    with torch.no_grad(), using_packed_attention(model):
        torch.testing.assert_close(compute_supervised_token_nll(model, batch), expected, atol=2e-5, rtol=1e-4)
        assert compute_step_loss(model, batch).item() == pytest.approx(expected.mean().item(), abs=1e-5)
        assert compute_step_loss(model, batch, 8).item() == pytest.approx(expected.sum().item() / 8, abs=1e-5)
        one = compute_step_loss(model, COLLATORS[name](ROWS[:1])).item()
    labels = torch.tensor([ROWS[0]["labels"]])
    own_loss = model(input_ids=torch.tensor([ROWS[0]["input_ids"]]), labels=labels, use_cache=False).loss
    assert one == pytest.approx(own_loss.item(), abs=1e-5)


def test_with_the_cache_rows_see_each_other(llama):
    """This is why the caller has to pass use_cache=False: if it ever fails, the warning can go."""
    batch = COLLATORS["packed"](ROWS)
    with torch.no_grad():
        packed = llama(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
        alone = llama(input_ids=torch.tensor([ROWS[-1]["input_ids"]])).logits
    assert (packed[0, -1] - alone[0, -1]).abs().max() > 1e-3


@settings(max_examples=12)
@given(st.data())
def test_any_lengths_and_masks(llama, data):
    rows = []
    for seed in range(data.draw(st.integers(1, 5))):
        length = data.draw(st.integers(1, 11))
        rows.append(example(length, data.draw(st.sets(st.integers(0, length - 1))), seed))
    rows.append(example(3, {2}, 9))
    expected = nll_of_each_row(llama, rows)
    for collator in COLLATORS.values():
        batch = collator(rows)
        assert all(v.dtype == torch.int64 for v in batch.values() if isinstance(v, torch.Tensor))
        assert batch["logits_to_keep"].tolist() == sorted(set(batch["logits_to_keep"].tolist()))
        assert batch["targets"].tolist() == [t for r in rows for t in r["labels"][1:] if t != -100]
        with torch.no_grad(), using_packed_attention(llama):
            torch.testing.assert_close(compute_supervised_token_nll(llama, batch), expected, atol=2e-5, rtol=1e-4)


def plain_values(batch):
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_by_hand():
    a = {"input_ids": [11, 12, 13], "labels": [11, -100, 13]}  # nothing stands before a first token that is marked
    b = {"input_ids": [21, 22], "labels": [21, 22]}
    rows = {"targets": [13, 22], "tokens": 5, "row_targets": (1, 1), "example_rows": (1, 1), "row_scores": (None, None)}
    assert plain_values(Collator(0)([a, b])) == rows | {
        "input_ids": [[11, 12, 13, 21, 22]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "logits_to_keep": [1, 3],
        "hidden_index": [0, 1],
    }
    assert plain_values(Collator(7, packing=False)([a, b])) == rows | {
        "input_ids": [[11, 12, 13], [21, 22, 7]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "logits_to_keep": [0, 1],
        "hidden_index": [1, 2],
    }


@pytest.mark.parametrize("name", COLLATORS)
def test_rows_of_one_example(llama, name):
    """An example of two rows is computed as two examples, and a value of it comes as a tensor."""
    first, second = example(9, {4, 8}, 1), example(6, {5}, 2)
    both = {k: [*first[k], *second[k]] for k in ("input_ids", "labels")}
    batch = COLLATORS[name]([both | {"line": 1, "row_lengths": [9, 6], "reference": [0.5, 1.5], "kind": "a"}])
    assert (batch["row_targets"], batch["example_rows"], batch["reference"].tolist()) == ((2, 1), (2,), [[0.5, 1.5]])
    with torch.no_grad(), using_packed_attention(llama):
        torch.testing.assert_close(
            compute_supervised_token_nll(llama, batch), nll_of_each_row(llama, [first, second]), atol=2e-5, rtol=1e-4
        )


def test_batch_without_a_target_is_refused():
    with pytest.raises(DataError, match=r"lines 5, 6\b"):
        Collator(0)([example(4, set(), 5), example(4, {0}, 6)])
