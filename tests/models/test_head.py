"""The head as its config describes it: the step's loss and gradients are those of the model's own forward and loss."""

import pytest
import torch
import transformers as tf
from models_zoo import DECODER, VOCAB, shake
from plain_way import alone, apart, gradients, loud, unfused, wide
from torch import nn

import slimtune
from slimtune.attention.register import packed_attention
from slimtune.errors import ModelError
from slimtune.kernels import cross_entropy
from slimtune.models.lm_head import get_hidden_states, get_lm_head
from slimtune.train_step.loss import check_packing_supported, make_collator, step_loss

PLAIN = {**DECODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**PLAIN, "head_dim": 8, "sliding_window": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
NONE = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": tf.LlamaConfig(**PLAIN),
    "llama, tied": tf.LlamaConfig(**PLAIN, tie_word_embeddings=True),
    "gemma2": tf.Gemma2Config(**GEMMA, final_logit_softcapping=3.0),
    "gemma3": tf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=3.0),
    "granite": tf.GraniteConfig(**PLAIN, logits_scaling=7.0, residual_multiplier=0.4, embedding_multiplier=3.0),
    "cohere": tf.CohereConfig(**PLAIN, logit_scale=0.3),
    "cohere2": tf.Cohere2Config(**PLAIN, logit_scale=0.3, sliding_window=4),
    "phi": tf.PhiConfig(**PLAIN, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt2": tf.GPT2Config(**GPT2, **NONE),
}
HEADS = {
    "gemma2": (1, 3.0),
    "gemma3": (1, 3.0),
    "granite": (1 / 7, None),
    "cohere": (0.3, None),
    "cohere2": (0.3, None),
}
ADAPTED = {
    "frozen": {"target_modules": "all-linear"},
    "adapted": {"target_modules": r".*(q_proj|c_attn|lm_head)"},
    "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def ids(n, seed):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


BEGIN = ids(9, 0)
ROWS = [
    {"input_ids": BEGIN + ids(5, 1), "labels": [-100] * 9 + ids(5, 1)},
    {"input_ids": BEGIN + ids(3, 2), "labels": [-100] * 9 + ids(3, 2)},
    {"input_ids": ids(7, 3), "labels": ids(7, 3)},
]


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")
    loud(model)
    if name == "phi":
        assert model.lm_head.bias is not None
    return model.to(dtype)


def same_as_the_models_own(model):
    """Both the loss of several rows and each trained tensor's gradient."""
    collator = make_collator(model, 0)
    assert collator.layout
    losses = []

    def plainly():
        losses.append(alone(model, ROWS))
        losses[-1].backward()

    def step():
        with packed_attention(model):
            losses.append(step_loss(model, collator(ROWS)))
            losses[-1].backward()

    with wide():
        with unfused():
            want = gradients(model, plainly)
        found = apart(gradients(model, step), want)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert losses[0] > 0.5  # a loss of nothing would say nothing
    assert found < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("way", ["frozen", "adapted"])
def test_loss_and_gradients(name, way):
    model = slimtune.get_peft_model(build(name), slimtune.LoraConfig(r=4, **ADAPTED[way]))
    shake(model)
    assert any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad) == (way == "adapted")
    same_as_the_models_own(model)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma2", "granite", "phi"])
def test_a_head_of_its_own(name):
    model = slimtune.get_peft_model(build(name), slimtune.LoraConfig(r=4, **ADAPTED["trained"]))
    shake(model)
    same_as_the_models_own(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_from_the_config(name):
    head = get_lm_head(build(name))
    assert (head.scale, head.cap) == pytest.approx(HEADS.get(name, (1, None)))
    assert head.vocabulary == VOCAB


@pytest.mark.parametrize("name", ["llama", "phi", "granite", "gemma2"])
def test_a_frozen_head_is_not_called(name):
    """Only then its gradient is found in the forward pass; an adapted one is run again backwards."""
    model = build(name).requires_grad_(False)
    head = get_lm_head(model)
    h = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    assert head.nats(h, torch.arange(5)).grad_fn.name() == "_CrossEntropyBackward"
    model.lm_head.weight.requires_grad_(True)
    assert head.nats(h, torch.arange(5)).grad_fn.name() != "_CrossEntropyBackward"


def test_the_head_is_given_no_row(monkeypatch):
    model = build("llama")
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape))
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]]), "use_cache": False}
    h = get_hidden_states(model, get_lm_head(model), inputs)
    assert rows == [(1, 0, VOCAB)]
    assert len(model.lm_head._forward_pre_hooks) == 0
    torch.testing.assert_close(model.lm_head(h), model(**inputs).logits)
    monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_hidden_states(model, get_lm_head(model), inputs)
    assert len(model.lm_head._forward_pre_hooks) == 0


# --- what is known to be right, and what is found to be wrong ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_taken(name, dtype):
    model = build(name, dtype)
    check_packing_supported(model, make_collator(model, 0))
    check_packing_supported(model, make_collator(model, 0, packing=False))


class Louder(tf.LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


class Biased(tf.LlamaForCausalLM):
    """Some logits are shifted."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(VOCAB, dtype=out.logits.dtype) / 50
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [Louder, Biased])
def test_a_head_that_does_more_is_refused(made, dtype):
    torch.manual_seed(0)
    model = made(CONFIGS["llama"])
    loud(model)
    model.to(dtype).train()
    with pytest.raises(ModelError, match=f"the loss of a {made.__name__} differs from the model's own") as e:
        check_packing_supported(model, make_collator(model, 0))
    assert "transformers' Trainer" in str(e.value)
    assert model.training


class Headless(tf.LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


def test_without_a_head_of_its_own_the_models_logits_are_taken():
    torch.manual_seed(0)
    model = Headless(CONFIGS["llama"]).double()
    loud(model)
    assert get_lm_head(model) is None
    with wide(), torch.no_grad(), packed_attention(model):
        torch.testing.assert_close(
            step_loss(model, make_collator(model, 0)(ROWS)), alone(model, ROWS), rtol=1e-12, atol=0
        )


def test_an_adapted_head_is_run_in_chunks():
    model = slimtune.get_peft_model(build("llama"), slimtune.LoraConfig(r=4, **ADAPTED["adapted"]))
    head = get_lm_head(model)
    rows = []
    head.module.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    n = cross_entropy.rows_at_once(VOCAB, torch.device("cpu"))
    head.nats(torch.randn(n + 5, 32, dtype=torch.float64), torch.zeros(n + 5, dtype=torch.int64))
    assert rows == [n, 5]
    assert isinstance(head.module, nn.Linear)
