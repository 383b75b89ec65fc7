"""Trainable tokens beyond the contract: tied heads, files of a tied model, special embeddings."""

import copy

import pytest
import torch
from adapter_checks import assert_loads, assert_merges
from models_zoo import gemma3, llama, run, shake, t5, tokens

from slimtune import LoraConfig, TrainableTokensConfig, get_peft_model
from slimtune.errors import TargetError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CHOSEN = [117, 3, 17]
BOTH = pytest.mark.parametrize(
    "config",
    [
        lambda **m: TrainableTokensConfig(token_indices=CHOSEN, **m),
        lambda **m: LoraConfig(target_modules=["q_proj"], trainable_token_indices=CHOSEN, **m),
    ],
    ids=["method", "lora"],
)


@BOTH
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_only_the_chosen_tokens_change(config, tie):
    model = get_peft_model(llama(tie=tie), config()).eval()
    for n, p in model.named_parameters():
        if "trainable_tokens" in n:
            with torch.no_grad():
                p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.1)
    others = torch.tensor([[5, 7, 9, 11]])
    assert not torch.equal(run(model), run(llama(tie=tie)))
    changed = (run(model, others) - run(llama(tie=tie), others)).abs().amax((0, 1)) > 1e-12
    assert sorted(changed.nonzero().flatten().tolist()) == (sorted(CHOSEN) if tie else [])


@BOTH
def test_a_tied_head_shares_the_rows(config, tmp_path):
    model = get_peft_model(llama(tie=True), config()).eval()
    assert sum("trainable_tokens" in n for n, _ in model.named_parameters()) == 1
    shake(model)
    twin = shake(copy.deepcopy(model), seed=9)
    assert_merges(twin)
    assert_loads(model, lambda: llama(tie=True), tmp_path)


def test_two_adapters_with_one_token_in_common_are_refused_together():
    model = get_peft_model(llama(tie=True), TrainableTokensConfig(token_indices=CHOSEN))
    model.add_adapter("other", TrainableTokensConfig(token_indices=[3, 5]))
    with pytest.raises(UsageError, match=r"'default'.*'other'"):
        model.set_adapter(["default", "other"])
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"'default'.*'other'"):
        model.merge_adapter(["other"])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.trainable_tokens_delta is head.trainable_tokens_delta
    assert head.token_indices == {"default": CHOSEN, "other": [3, 5]}
    assert torch.equal(head.trainable_tokens_original["other"], llama(tie=True).lm_head.weight[[3, 5]])


@pytest.mark.parametrize("base", [gemma3, t5], ids=["scaled", "encoder-decoder"])
def test_special_embeddings_start_unchanged_and_merge(base):
    model = get_peft_model(base(), TrainableTokensConfig(token_indices=CHOSEN)).eval()
    assert torch.equal(run(model), run(base()))
    shake(model)
    assert_merges(model)


def test_head_and_embedding_can_train_different_rows():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": CHOSEN, "lm_head": [5]})
    model = get_peft_model(llama(tie=True), config)
    shapes = sorted(tuple(p.shape) for n, p in model.named_parameters() if "trainable_tokens" in n)
    assert shapes == [(1, 32), (3, 32)]


def test_rows_get_the_gradient_of_input_and_head():
    model = get_peft_model(llama(tie=True), TrainableTokensConfig(token_indices=CHOSEN))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    whole = llama(tie=True)
    whole(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(rows.grad, whole.get_input_embeddings().weight.grad[CHOSEN])


def test_unknown_rows_and_names_are_refused():
    with pytest.raises(TargetError, match=r"\b999\b"):
        get_peft_model(llama(), TrainableTokensConfig(token_indices=[999]))
    with pytest.raises(TargetError, match=r"'embed_token' .*'model.embed_tokens'"):
        get_peft_model(llama(), LoraConfig(trainable_token_indices={"embed_token": [3]}))
    with pytest.raises(TargetError, match="modules_to_save"):
        get_peft_model(llama(), LoraConfig(trainable_token_indices=[3], modules_to_save=["embed_tokens"]))
