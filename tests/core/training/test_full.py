"""Full fine-tuning through the same training and evaluation as every method."""

from pathlib import Path

import pytest
import torch
from tiny_run import adapter, distance, recipe_of, train_until
from transformers import AutoModelForCausalLM

from slimtune import get_peft_model
from slimtune.core.training.base_model import load_base_tokenizer
from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.loss import compute_step_loss, make_collator
from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.methods.full import FullConfig


@pytest.fixture
def full(settings):
    """Settings of a full run of four steps of six rows."""
    return {**settings, "method": {"name": "full"}, "train": {"max_steps": 4, "batch_size": 6, "learning_rate": 1e-3}}


def test_one_step_equals_adamw_on_the_base(full):
    recipe = recipe_of(full, max_steps=1, batch_size=24, lr_scheduler="constant", warmup_ratio=0, max_grad_norm=0)
    result = train(recipe)
    tokenizer = load_base_tokenizer(recipe.model, recipe.data.chat_template)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    batch = make_collator(model, tokenizer.pad_token_id, packing=False)(
        tokenize_recipe_datasets(recipe, tokenizer).train
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    compute_step_loss(model.train(), batch).backward()
    optimizer.step()
    expected, trained = dict(model.named_parameters()), adapter(result.run)
    assert trained.keys() == {f"base_model.model.{n}" for n in expected}
    assert all(torch.allclose(trained[f"base_model.model.{n}"], p, atol=2e-5) for n, p in expected.items())
    assert result.trainable_params == sum(p.numel() for p in expected.values())


def test_bf16_run_keeps_fp32_masters_and_resumes_bit_for_bit(full, tmp_path, monkeypatch):
    full["model"]["dtype"] = "bfloat16"
    whole = train(recipe_of({**full, "output_dir": str(tmp_path / "whole")}))
    train_until(recipe_of(full, save_steps=2), monkeypatch, 2, RuntimeError)
    resumed = train(recipe_of(full, save_steps=2), resume=True)
    assert {t.dtype for t in adapter(whole.run).values()} == {torch.float32}
    assert distance(whole.run, resumed.run) == 0


def test_evaluation_against_its_base(full):
    full["data"]["test"] = full["data"]["validation"]
    result = evaluate(Path(train(recipe_of(full)).run), EvalSettings(split="test", skip_prompt_test=True))
    assert result.measures.loss_reduction.value > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_stay_tied_and_the_base_comes_back(tiny_llama, dtype):
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapted = get_peft_model(model, FullConfig())
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in before.values())
    ids = torch.arange(5, 25)[None]
    adapted(ids, labels=ids).loss.backward()
    torch.optim.AdamW(trained, lr=1e-2).step()
    assert adapted.get_input_embeddings().weight.equal(adapted.get_output_embeddings().weight)
    assert not adapted.get_input_embeddings().weight.equal(before["model.embed_tokens.weight"])
    assert all(p.equal(before[n]) for n, p in adapted.unload().named_parameters())


def test_quantized_base_is_refused(full):
    pytest.importorskip("bitsandbytes")
    full["model"]["quantization"] = "nf4"
    with pytest.raises(UsageError, match="quantized"):
        train(recipe_of(full))
