"""The training step of each family runs on fake tensors, with shared prefixes: nothing in it depends on values."""

import models_zoo as zoo
import pytest
import torch

import slimtune
from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.training.loss import compute_step_loss, make_collator
from slimtune.planning.fake_tensors import fake_tensor_mode, replace_meta_with_fake_cpu_tensors

PREFIX = list(range(3, 14))
ROWS = [PREFIX + list(range(20, 20 + n)) for n in (5, 1, 9)] + [list(range(50, 57))]
EXAMPLES = [{"input_ids": row, "labels": row} for row in ROWS]


def run_fake_step(name="llama", checkpointing=False, dropout=0.1, collate=None, **config):
    with torch.device("meta"):
        base = getattr(zoo, name)(dtype=torch.bfloat16)
        config = {"r": 4, "target_modules": "all-linear", "lora_dropout": dropout} | config
        model = slimtune.get_peft_model(base, slimtune.LoraConfig(**config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with fake_tensor_mode():
        replace_meta_with_fake_cpu_tensors(model)
        batch = make_collator(model, 0, **{"packing": True, "share_prefix": True, **(collate or {})})(EXAMPLES)
        with using_packed_attention(model):
            compute_step_loss(model, batch).backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or (parameter.grad.shape, parameter.grad.dtype) == (
            parameter.shape,
            torch.float32,
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "gpt2"])
def test_families(name, checkpointing):
    run_fake_step(name, checkpointing)


@pytest.mark.parametrize("collate", [{"share_prefix": False}, {"packing": False}], ids=str)
def test_other_layouts(collate):
    run_fake_step(collate=collate)


@pytest.mark.parametrize("head", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_trained_head(head):
    run_fake_step(**head)


def test_dropout_leaves_the_random_state():
    before = torch.get_rng_state()
    run_fake_step(dropout=0.1)
    assert torch.equal(torch.get_rng_state(), before)
