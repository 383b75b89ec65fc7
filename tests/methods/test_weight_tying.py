"""`ensure_weight_tying`: the modules that are tied to the input embedding follow it, and stay tied after a merge."""

import pytest
import torch
from adapter_checks import assert_loads
from models_zoo import llama, run, shake, t5

import slimtune
from slimtune import LoKrConfig, LoraConfig, get_peft_model
from slimtune.errors import AdapterError, ConfigError

CLOSE = 1e-9
TARGETS = {"target_modules": ["q_proj", "lm_head"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
EACH = pytest.mark.parametrize("settings", [TARGETS, SAVED], ids=["targets", "modules_to_save"])


def adapted(settings, base=None, **more):
    config = LoraConfig(r=2, ensure_weight_tying=True, **settings, **more)
    return get_peft_model(base or llama(tie=True), config)


@EACH
def test_files_work_in_both_libraries(settings, tmp_path):
    ours = shake(adapted(settings))
    assert_loads(ours, lambda: llama(tie=True), tmp_path / "ours")


@EACH
@pytest.mark.parametrize("base", [llama, t5])
def test_a_merged_model_stays_tied(settings, base, tmp_path):
    names = {"target_modules": [n.replace("q_proj", "q") if base is t5 else n for n in settings["target_modules"]]}
    model = shake(adapted({**settings, **names}, base(tie=True) if base is llama else base()))
    expected = run(model.eval())
    assert (expected - run(base(tie=True) if base is llama else base())).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    merged.save_pretrained(tmp_path)
    assert (run(merged) - expected).abs().max() < 1e-6
    assert (run(type(merged).from_pretrained(tmp_path, dtype=torch.float64)) - expected).abs().max() < 1e-6


def test_gradients_are_those_of_one_matrix():
    model = shake(adapted({"target_modules": ["embed_tokens"]}))
    ids = torch.arange(1, 10)[None]  # 0 is padding
    model(ids).logits.sin().sum().backward()
    lora = model.model.embed_tokens.adapters["default"]
    A, B = (p.detach().requires_grad_() for p in lora.low_rank())
    base = llama(tie=True)
    weight = base.lm_head.weight + lora.scale * (B @ A).t()
    out = torch.func.functional_call(base, {"model.embed_tokens.weight": weight, "lm_head.weight": weight}, (ids,))
    out.logits.sin().sum().backward()
    assert (A.grad - lora.lora_embedding_A.grad).abs().max() < CLOSE
    assert (B.grad - lora.lora_embedding_B.grad).abs().max() < CLOSE
    assert len([p for p in model.parameters() if p.requires_grad]) == 2


def test_tied_tensors_that_differ_in_a_file_are_refused(tmp_path):
    model = adapted(TARGETS)
    tensors = slimtune.get_peft_model_state_dict(model)
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors["base_model.model.lm_head.lora_A.weight"] + 1
    with pytest.raises(AdapterError, match=r"\btied\b"):
        slimtune.set_peft_model_state_dict(model, tensors)


@pytest.mark.parametrize(
    ("config", "tie", "message"),
    [
        (LoraConfig(**TARGETS), True, "ensure_weight_tying is not True"),
        (LoKrConfig(target_modules=["lm_head"]), True, "the method cannot tie its adapters"),
        (
            LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True),
            True,
            "no module that is tied to the embedding is in",
        ),
        (LoraConfig(**TARGETS, ensure_weight_tying=True), False, "no module that is tied to the embedding exists"),
        (LoraConfig(trainable_token_indices=[1], ensure_weight_tying=True), False, "does not have tied weights"),
    ],
)
def test_what_is_not_tied_warns(config, tie, message):
    with pytest.warns(UserWarning, match=message):
        get_peft_model(llama(tie=tie), config)


def test_what_cannot_be_tied_is_refused():
    tokens = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(ConfigError, match="tying"):
        adapted({"trainable_token_indices": tokens})
    with pytest.raises(ConfigError, match="use_dora=True"):
        adapted(TARGETS, use_dora=True)
