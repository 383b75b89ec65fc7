"""Every method in the packed training step: packed rows give the loss and gradients of each row run alone."""

import pytest
import torch
from method_cases import CASES, config
from models_zoo import gemma3, gpt2, llama, random_ids, shake
from reference import compute_in_float64, get_gradients, largest_relative_error, loss_of_separate_rows, row
from torch import nn

from slimtune import get_peft_model
from slimtune.core.attention.attention_functions import LAYOUT_KWARG, using_packed_attention
from slimtune.core.attention.packed_layout import PackedLayout
from slimtune.core.data.packing import pack_into_one_sequence
from slimtune.core.kernels import activation_offload
from slimtune.core.models.lm_head import require_matching_lm_head_loss
from slimtune.core.training import loss as step
from slimtune.core.training.loss import compute_step_loss, make_collator
from slimtune.core.training.memory_savings import apply_memory_savings
from slimtune.errors import UsageError
from slimtune.planning.fake_tensors import list_module_tensors
from slimtune.planning.memory_tracker import MemoryTracker

BASES = {"llama": llama, "gpt2": gpt2, "gemma3": gemma3}
PROMPTS = ("adaption_prompt", "p_tuning", "prefix_tuning", "prompt_tuning")
EVERY_METHOD = pytest.mark.parametrize("method", sorted(CASES))

SHARED, NESTED = random_ids(10, 1), random_ids(9, 2)
ROWS = [
    row(SHARED + random_ids(6, 3), range(10, 16)),  # its first supervised token follows the shared beginning
    row(SHARED + NESTED + random_ids(5, 4), {19, 22, 23}),  # follows the nested beginning
    row(SHARED + NESTED + random_ids(4, 5), {12, 21}),  # inside a part that two rows share
    row(random_ids(7, 6), range(7)),  # shares nothing
    row(SHARED, {4, 9}),  # is the beginning of others
]


def prepare(model):
    shake(model)
    for module in model.modules():  # GPT-2 has dropout by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def adapted(method, base="llama", dtype=torch.float64):
    if base == "gemma3" and method == "adaption_prompt":
        pytest.skip("refused by a TargetError: its keys are normalized")
    return prepare(get_peft_model(BASES[base](dtype=dtype), config(method, base)))


def loss_and_gradients(model, compute_loss):
    losses = []

    def backward():
        losses.append(compute_loss())
        losses[0].backward()

    found = get_gradients(model, backward)
    return losses[0].item(), found


def packed_loss_and_gradients(model):
    """With the method's regularization loss, which the model's own loss includes in `loss_of_separate_rows`."""

    def compute_loss():
        regularization = model.regularization_loss()
        loss = compute_step_loss(model, make_collator(model, 0)(ROWS))
        return loss if regularization is None else loss + regularization

    with using_packed_attention(model) as is_packed:
        assert is_packed
        return loss_and_gradients(model, compute_loss)


def assert_packed_equals_alone(model):
    with compute_in_float64():
        loss, packed = packed_loss_and_gradients(model)
        expected_loss, expected = loss_and_gradients(model, lambda: loss_of_separate_rows(model, ROWS))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert largest_relative_error(packed, expected) < 1e-12
    return loss, packed


def test_the_rows_share_and_nest():
    packed = pack_into_one_sequence([r["input_ids"] for r in ROWS])
    assert len(packed.tokens) == sum(len(r["input_ids"]) for r in ROWS) - 3 * len(SHARED) - len(NESTED)
    assert max(len(packed.layout.ancestors(i)) for i in range(len(packed.layout.lengths))) == 3


@EVERY_METHOD
@pytest.mark.parametrize("base", ["llama", *(pytest.param(b, marks=pytest.mark.slow) for b in ("gpt2", "gemma3"))])
def test_packed_equals_alone(method, base, monkeypatch):
    """And recomputing alone, then checkpointing, offload and tiling together change nothing (one base shows it)."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    model = adapted(method, base)
    loss, packed = assert_packed_equals_alone(model)
    for more in ({}, {"checkpointing": True, "offload": True, "tile": 7}) if base == "llama" else ():
        apply_memory_savings(model, **more)
        with compute_in_float64():
            same_loss, saved = packed_loss_and_gradients(model)
        assert same_loss == pytest.approx(loss, rel=1e-12)
        assert largest_relative_error(saved, packed) < 1e-12


@pytest.mark.parametrize(
    ("base", "inner", "outer"),
    # Every pair of methods once, each base several times.
    [(("llama", "gpt2", "gemma3")[(i + j) % 3], a, b) for i, a in enumerate(PROMPTS) for j, b in enumerate(PROMPTS)],
)
def test_packed_equals_alone_with_two_prompts(base, inner, outer):
    if base == "gemma3" and "adaption_prompt" in (inner, outer):
        base = "llama"
    model = adapted(inner, base)
    model.add_adapter("second", config(outer, base, **CASES[outer].other))
    model.set_adapter(["default", "second"])
    assert_packed_equals_alone(prepare(model))


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("base", BASES)
def test_packed_equals_alone_with_eager_attention(method, base):
    model = adapted(method, base)
    model.set_attn_implementation("eager")
    assert_packed_equals_alone(model)


@pytest.mark.parametrize("method", [m for m, c in sorted(CASES.items()) if c.settings.get("target_modules")])
def test_packed_equals_alone_at_a_tied_head(method):
    if method == "lora+tokens":
        pytest.skip("the head follows the embedding's tokens already")
    model = get_peft_model(llama(tie=True), CASES[method](target_modules=["lm_head", "q_proj"]))
    assert_packed_equals_alone(prepare(model))


@EVERY_METHOD
def test_head_is_found_exact_before_training(method):
    model = adapted(method, dtype=torch.bfloat16)
    assert require_matching_lm_head_loss(model) is None
    assert make_collator(model, 0).packing
    assert model.training


@EVERY_METHOD
def test_micro_batches_fill_the_free_memory(method, monkeypatch):
    base = llama(dtype=torch.float32, hidden_size=128, intermediate_size=192)
    model = prepare(get_peft_model(base, config(method, "llama")))
    collator = make_collator(model, 0)
    needed = step.measure_activation_bytes(model, collator, 120)
    monkeypatch.setattr(step, "count_free_memory", lambda device: 2 * needed)
    assert step.choose_sufficient_micro_batch_tokens(model, collator, 9) == pytest.approx(120, rel=0.05)


def test_measuring_activations_keeps_none_of_them():
    model = prepare(get_peft_model(llama(), config("lora", "llama")))
    with MemoryTracker() as tracker:
        tracker.assign(list_module_tensors(model), "weights")
        assert step.measure_activation_bytes(model, make_collator(model, 0)) > 0
    assert +tracker.live == {"weights": tracker.live["weights"]}


def test_layers_share_the_masks_behind_a_prefix():
    layout = PackedLayout((4, 3), (-1, 0))
    assert layout.with_prefix_keys(5) is layout.with_prefix_keys(5)
    assert [layout.with_prefix_keys(n).num_prefix_keys for n in (5, 2)] == [5, 2]
    assert layout.num_prefix_keys == 0
    assert layout.with_prefix_keys(5).with_prefix_keys(2) == layout.with_prefix_keys(7)


@pytest.mark.parametrize("names", [["default"], ["default", "__base__", "default", "default", "default"]])
def test_a_packed_sequence_has_one_adapter(names):
    model = adapted("prompt_tuning")
    batch = make_collator(model, 0)(ROWS)
    with using_packed_attention(model), pytest.raises(UsageError, match=r"adapter_names.*packed"):
        model(input_ids=batch["input_ids"], adapter_names=names, use_cache=False, **{LAYOUT_KWARG: batch["layout"]})
