"""Every method through the step: rows laid together give the loss and the gradients of each row run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import CASES
from models_zoo import DECODER, gpt2, llama, shake, tokens
from plain_way import alone, apart, gradients, wide
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import slimtune.methods
import slimtune.train_step.loss
from slimtune import get_peft_model
from slimtune.attention.packed_layout import PackedLayout
from slimtune.attention.register import LAYOUT_KWARG, packed_attention
from slimtune.data.packing import pack_sequences
from slimtune.errors import UsageError
from slimtune.train_step.loss import (
    auto_micro_batch_tokens,
    check_packing_supported,
    make_collator,
    measure_activation_bytes,
    step_loss,
)


def gemma3(dtype=torch.float64):
    """Its embedding scales, and its window of 4 is shorter than what rows share, and than a prefix."""
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4, layer_types=layers)
    return Gemma3ForCausalLM(config).to(dtype)


ZOO = {"llama": llama, "gpt2": gpt2, "gemma3": gemma3}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
PROMPTS = ("adaption_prompt", "p_tuning", "prefix_tuning", "prompt_tuning")
EVERY_METHOD = pytest.mark.parametrize("method", sorted(CASES))


def takes(base, *methods):
    return base != "gemma3" or "adaption_prompt" not in methods  # its keys are normed: refused with a TargetError


def row(ids, supervised):
    return {"input_ids": ids, "labels": [t if i in supervised else -100 for i, t in enumerate(ids)]}


def some(count, seed):
    return tokens(1, count, seed)[0].tolist()


BEGUN, NESTED = some(10, 1), some(9, 2)
ROWS = [
    row(BEGUN + some(6, 3), range(10, 16)),  # its first token to learn comes right after what is shared
    row(BEGUN + NESTED + some(5, 4), {19, 22, 23}),  # right after the nested beginning
    row(BEGUN + NESTED + some(4, 5), {12, 21}),  # within what two rows share
    row(some(7, 6), range(7)),  # shares nothing
    row(BEGUN, {4, 9}),  # is what others begin with
]


def prepared(model):
    shake(model)
    for module in model.modules():  # GPT-2 drops by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def config(method, base, **more):
    return CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}), **more)


def adapted(method, base="llama", dtype=torch.float64):
    return prepared(get_peft_model(ZOO[base](dtype=dtype), config(method, base)))


def loss_and_gradients(model, loss):
    """`loss` is run and differentiated; what the method adds to a loss is in it, as the trainer has it."""
    losses = []

    def backward():
        losses.append(loss())
        losses[0].backward()

    found = gradients(model, backward)
    return losses[0].item(), found


def through_the_step(model):
    def loss():
        penalty = model.regularization_loss()
        laid = step_loss(model, make_collator(model, 0)(ROWS))
        return laid if penalty is None else laid + penalty

    with packed_attention(model) as taken:
        assert taken
        return loss_and_gradients(model, loss)


def assert_rows_are_as_alone(model, most):
    loss, got = through_the_step(model)
    wanted, want = loss_and_gradients(model, lambda: alone(model, ROWS))
    assert loss == pytest.approx(wanted, rel=most)
    assert apart(got, want) < most


def test_these_rows_share_and_nest():
    laid = pack_sequences([r["input_ids"] for r in ROWS])
    assert len(laid.tokens) == sum(len(r["input_ids"]) for r in ROWS) - 3 * len(BEGUN) - len(NESTED)
    assert max(len(laid.layout.path(i)) for i in range(len(laid.layout.lengths))) == 2


@EVERY_METHOD
@pytest.mark.parametrize("base", ZOO)
def test_rows_laid_together_are_each_as_alone(method, base):
    if not takes(base, method):
        pytest.skip("refused by name")
    with wide():
        assert_rows_are_as_alone(adapted(method, base), EXACT[torch.float64])


@EVERY_METHOD
def test_so_in_fp32(method):
    # A bias added to all keys of a row all but cancels in the softmax, and rounding is left.
    most = EXACT[torch.float32] * (10 if method == "bitfit" else 1)
    assert_rows_are_as_alone(adapted(method, dtype=torch.float32), most)


@pytest.mark.parametrize("inner", PROMPTS)
@pytest.mark.parametrize("outer", PROMPTS)
@pytest.mark.parametrize("base", ZOO)
def test_so_behind_two_prompts_at_once(base, inner, outer):
    if not takes(base, inner, outer):
        pytest.skip("refused by name")
    model = adapted(inner, base)
    model.add_adapter("second", config(outer, base, **CASES[outer].other))
    model.set_adapter(["default", "second"])
    with wide():
        assert_rows_are_as_alone(prepared(model), EXACT[torch.float64])


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("base", ZOO)
def test_so_by_eager_attention(method, base):
    if not takes(base, method):
        pytest.skip("refused by name")
    model = adapted(method, base)
    model.set_attn_implementation("eager")
    with wide():
        assert_rows_are_as_alone(model, EXACT[torch.float64])


@EVERY_METHOD
def test_checkpointed_is_plain(method):
    loss, plain = through_the_step(adapted(method))
    model = adapted(method)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, checkpointed = through_the_step(model)
    assert again == loss
    assert apart(checkpointed, plain) < 1e-14


@EVERY_METHOD
def test_is_found_exact_before_training(method):
    model = adapted(method, dtype=torch.bfloat16)
    assert check_packing_supported(model, make_collator(model, 0)) is None
    assert model.training


@EVERY_METHOD
def test_a_pass_is_as_long_as_free_memory_allows(method, monkeypatch):
    base = llama(dtype=torch.float32, hidden_size=128, intermediate_size=192)
    model = prepared(get_peft_model(base, config(method, "llama")))
    collator = make_collator(model, 0)
    allowed = measure_activation_bytes(model, collator, 120)
    monkeypatch.setattr(slimtune.train_step.loss, "free_bytes", lambda device: 2 * allowed)
    assert auto_micro_batch_tokens(model, collator, 9) == pytest.approx(120, rel=0.05)


def test_layers_share_the_masks_behind_a_prefix():
    layout = PackedLayout((4, 3), (-1, 0))
    assert layout.behind_keys(5) is layout.behind_keys(5)
    assert (layout.behind_keys(5).keys_before, layout.behind_keys(2).keys_before, layout.keys_before) == (5, 2, 0)
    assert layout.behind_keys(5).behind_keys(2) == layout.behind_keys(7)


@pytest.mark.parametrize("names", [["default"], ["default", "__base__", "default", "default", "default"]])
def test_rows_in_one_sequence_have_one_adapter(names):
    model = adapted("prompt_tuning")
    batch = make_collator(model, 0)(ROWS)
    with packed_attention(model), pytest.raises(UsageError, match="one row of the batch"):
        model(input_ids=batch["input_ids"], adapter_names=names, use_cache=False, **{LAYOUT_KWARG: batch["layout"]})


@pytest.mark.parametrize("method", [m for m, c in sorted(CASES.items()) if c.settings.get("target_modules")])
def test_so_at_a_head_that_is_tied(method):
    if method == "lora+tokens":
        pytest.skip("the head follows the embedding's tokens already")
    base = llama(tie=True)
    with wide():
        adapter = CASES[method](target_modules=["lm_head", "q_proj"])
        assert_rows_are_as_alone(prepared(get_peft_model(base, adapter)), EXACT[torch.float64])


def test_the_page_says_of_each_method_what_it_uses():
    page = (Path(__file__).parents[2] / "docs/step.md").read_text()
    assert {m for m in slimtune.methods.built_in_methods() if f"\n| [{m}](methods/{m}.md)" not in page} == set()
