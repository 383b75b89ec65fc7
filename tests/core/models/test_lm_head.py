"""Loss and gradients from hidden states and the head's config equal those of the model's own forward and loss."""

import pytest
import tiny_families
import torch
from models_zoo import VOCAB, random_ids, shake
from reference import (
    compute_in_float64,
    get_gradients,
    largest_relative_error,
    loss_of_separate_rows,
    row,
    unfused_lora,
)

import slimtune
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.kernels import cross_entropy
from slimtune.core.models.lm_head import get_hidden_states, get_lm_head_with_scale_and_cap
from slimtune.core.training.loss import compute_step_loss, make_collator

CONFIGS = {
    # changes of a family's config, scale and soft cap of its logits
    "llama": ({}, 1, None),
    "llama, tied": ({"tie_word_embeddings": True}, 1, None),
    "gemma2": ({"final_logit_softcapping": 3.0}, 1, 3.0),
    "gemma3_text": ({"final_logit_softcapping": 3.0}, 1, 3.0),
    "granite": ({"logits_scaling": 7.0, "residual_multiplier": 0.4}, 1 / 7, None),
    "cohere": ({"logit_scale": 0.3}, 0.3, None),
    "cohere2": ({"logit_scale": 0.3}, 0.3, None),
    "phi": ({}, 1, None),
    "gpt2": ({}, 1, None),
}
ADAPTED = {
    "frozen": {"target_modules": "all-linear"},
    "adapted": {"target_modules": r".*(q_proj|c_attn|lm_head)"},
    "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}

PREFIX = random_ids(9, 0)
ROWS = [
    row(PREFIX + random_ids(5, 1), range(9, 14)),
    row(PREFIX + random_ids(3, 2), range(9, 12)),
    row(random_ids(7, 3), range(7)),
]


def build(name, dtype=torch.float64):
    model = tiny_families.build(name.partition(",")[0], num_hidden_layers=2, **CONFIGS[name][0]).to(dtype)
    model.set_attn_implementation("eager")
    return model


HEADS = [(name, head) for name in CONFIGS for head in ("frozen", "adapted")]
HEADS += [(name, "trained") for name in ("llama", "llama, tied", "gemma2", "granite", "phi")]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_loss_and_gradients(name, head):
    model = shake(slimtune.get_peft_model(build(name), slimtune.LoraConfig(r=4, **ADAPTED[head])))
    assert any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad) == (head != "frozen")
    collator = make_collator(model, 0)
    assert collator.with_packed_layout
    losses = []

    def run_rows_alone():
        losses.append(loss_of_separate_rows(model, ROWS))
        losses[-1].backward()

    def run_step():
        with using_packed_attention(model):
            losses.append(compute_step_loss(model, collator(ROWS)))
            losses[-1].backward()

    with compute_in_float64():
        with unfused_lora():
            expected = get_gradients(model, run_rows_alone)
        error = largest_relative_error(get_gradients(model, run_step), expected)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    assert losses[0] > 0.5  # a loss near 0 would prove nothing
    assert error < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_head_from_config(name):
    head = get_lm_head_with_scale_and_cap(build(name))
    assert (head.scale, head.cap) == pytest.approx(CONFIGS[name][1:])
    assert head.vocabulary == VOCAB


def test_frozen_head_is_not_called():
    """Only then the gradient is computed in the forward pass; a trained head is recomputed in the backward pass."""
    model = build("phi").requires_grad_(False)
    head, h = get_lm_head_with_scale_and_cap(model), torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    assert head.target_nll(h, torch.arange(5)).grad_fn.name() == "_CrossEntropyBackward"
    model.lm_head.bias.requires_grad_(True)
    assert head.target_nll(h, torch.arange(5)).grad_fn.name() != "_CrossEntropyBackward"


def test_adapted_head_runs_in_chunks():
    model = slimtune.get_peft_model(build("llama"), slimtune.LoraConfig(r=4, **ADAPTED["adapted"]))
    head, rows = get_lm_head_with_scale_and_cap(model), []
    head.module.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    n = cross_entropy.count_rows_per_logit_chunk(VOCAB, torch.device("cpu"))
    head.target_nll(torch.randn(n + 5, 32, dtype=torch.float64), torch.zeros(n + 5, dtype=torch.int64))
    assert rows == [n, 5]


def test_hidden_states(monkeypatch):
    model, shapes = build("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]]), "use_cache": False}
    h = get_hidden_states(model, get_lm_head_with_scale_and_cap(model), inputs)
    assert shapes == [(1, 0, VOCAB)]  # the head computes nothing
    torch.testing.assert_close(model.lm_head(h), model(**inputs).logits)
    monkeypatch.setattr(model.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get_hidden_states(model, get_lm_head_with_scale_and_cap(model), inputs)
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_model_without_head():
    model = build("llama")
    model.get_output_embeddings = lambda: None
    assert get_lm_head_with_scale_and_cap(model) is None
    with compute_in_float64(), torch.no_grad(), using_packed_attention(model):
        loss = compute_step_loss(model, make_collator(model, 0)(ROWS))
        torch.testing.assert_close(loss, loss_of_separate_rows(model, ROWS), rtol=1e-12, atol=0)
