"""Checkpointing, offload and tiling alone change no gradient; `test_packed_step.py` has all with every method."""

import copy

import models_zoo as zoo
import pytest
import torch
from reference import (
    compute_in_float64,
    get_gradients,
    largest_relative_error,
    saved_for_backward,
    slope_along,
    storage_bytes,
)
from test_packed_step import ROWS, adapted, packed_loss_and_gradients
from transformers import LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.granite.modeling_granite import GraniteMLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from slimtune import LoraConfig, get_peft_model
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.kernels import activation_offload
from slimtune.core.training.loss import compute_step_loss, compute_supervised_token_nll, make_collator
from slimtune.core.training.memory_savings import (
    apply_memory_savings,
    enable_activation_checkpointing,
    enable_tiled_mlp,
    has_same_forward_code,
)
from slimtune.errors import UsageError

SAVINGS = {
    "recomputed": {},
    "checkpointed": {"checkpointing": True},
    "offloaded": {"checkpointing": True, "offload": True},
    "tiled": {"tile": 7},
    "all": {"checkpointing": True, "offload": True, "tile": 7},
}


@pytest.fixture(autouse=True)
def offload_every_tensor(monkeypatch):
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


def with_savings(model, **savings):
    apply_memory_savings(model, **savings)
    return model


@pytest.mark.parametrize("savings", [{}, {"tile": 7}], ids=["recomputed", "tiled"])
def test_savings_survive_eval_and_train(savings, tmp_path):
    """transformers 5.25 loads with `use_kernels`, and then changes each forward with the mode."""
    zoo.llama().save_pretrained(tmp_path)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), LoraConfig(r=2))
    apply_memory_savings(model, **savings)
    replaced = [m for m in model.modules() if "forward" in vars(m)]
    assert replaced
    model.eval()
    model.train()
    assert [m for m in model.modules() if "forward" in vars(m)] == replaced


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_each_saving_alone(saving, dtype, tolerance):
    with compute_in_float64():
        _, expected = packed_loss_and_gradients(adapted("lora", dtype=dtype))
        _, saved = packed_loss_and_gradients(with_savings(adapted("lora", dtype=dtype), **SAVINGS[saving]))
    assert largest_relative_error(saved, expected) < tolerance


def test_two_micro_batches_accumulate():
    def backward(model):
        for rows in (ROWS, ROWS[:2]):
            compute_step_loss(model, make_collator(model, 0)(rows)).backward()

    with compute_in_float64():
        models = adapted("lora"), with_savings(adapted("lora"), **SAVINGS["all"])
        expected, saved = (get_gradients(m, lambda m=m: backward(m)) for m in models)
    assert largest_relative_error(saved, expected) < 1e-12


def test_recomputing_repeats_the_dropout():
    """With dropout the gradient is that of the computed loss, by finite differences."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_dropout=0.4, target_modules=["down_proj"])
    model = zoo.shake(with_savings(get_peft_model(zoo.llama(), config), **SAVINGS["all"])).train()
    weight = model.get_submodule("model.layers.0.mlp.down_proj").adapters["default"].lora_B.weight
    direction = torch.randn_like(weight)

    def loss():
        torch.manual_seed(5)
        return compute_step_loss(model, make_collator(model, 0)(ROWS))

    with compute_in_float64(), using_packed_attention(model):
        loss().backward()
        expected = slope_along(weight, direction, loss)
    assert (weight.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mlp", [MistralMLP, Qwen3MLP, Gemma2MLP, GraniteMLP])
def test_families_that_copy_llama_are_recognized(mlp):
    assert has_same_forward_code(mlp.__new__(mlp), LlamaMLP)


@pytest.mark.parametrize("other", [Phi3MLP, GPT2MLP, LlamaRMSNorm])
def test_other_modules_are_not(other):
    assert not has_same_forward_code(other.__new__(other), LlamaMLP)


def test_activations_with_parameters_get_their_gradients():
    model = zoo.llama()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.PReLU(dtype=torch.float64)
    with_savings(model)
    compute_step_loss(model, make_collator(model, 0)(ROWS[:1])).backward()
    assert mlp.act_fn.weight.grad.abs() > 0


def test_recomputing_keeps_less():
    def kept(**savings):
        model = get_peft_model(zoo.llama(dtype=torch.bfloat16), LoraConfig(r=2, target_modules="all-linear"))
        with_savings(model.train(), **savings)
        batch = make_collator(model, 0)(ROWS)
        with using_packed_attention(model):
            found = saved_for_backward(lambda: compute_step_loss(model, batch), [*model.parameters(), *model.buffers()])
        return storage_bytes(found)

    assert kept() < 0.7 * kept(tile=10**6)  # one tile changes nothing


def test_tiling_changes_no_score():
    model = adapted("lora").eval()
    with torch.no_grad(), compute_in_float64():
        before = compute_supervised_token_nll(model, make_collator(model, 0)(ROWS))
        assert enable_tiled_mlp(model, 5) == 7  # two norms and a feed-forward in each of two layers, and the last norm
        after = compute_supervised_token_nll(model, make_collator(model, 0)(ROWS))
    assert (before - after).abs().max() < 1e-12


def test_copy_of_a_tiled_model_has_its_own_modules():
    model = adapted("lora")
    enable_tiled_mlp(model, 5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    mlp = twin.get_submodule("model.layers.0.mlp")
    assert mlp(torch.ones(1, 9, 32, dtype=torch.float64)).abs().max() > 0


def test_the_feed_forward_runs_twice_not_three_times():
    model = with_savings(adapted("lora"), checkpointing=True, tile=7)
    calls = []
    model.get_submodule("model.layers.1.mlp.up_proj").register_forward_hook(lambda *_: calls.append(1))
    with using_packed_attention(model):
        batch = make_collator(model, 0)(ROWS)
        compute_step_loss(model, batch).backward()
    assert len(calls) == 2 * -(-batch["input_ids"].shape[1] // 7)


def test_models_without_layers_are_refused():
    with pytest.raises(UsageError):
        enable_tiled_mlp(torch.nn.Linear(2, 2), 4)
    with pytest.raises(UsageError):
        enable_activation_checkpointing(torch.nn.Linear(2, 2))
