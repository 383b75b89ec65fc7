"""slimtune against peft, in numbers: forward, files both ways, merges and training, float64, 1e-9."""

import json
import re

import peft
import pytest
import torch
from models_zoo import (
    bert_classifier,
    bert_encoder,
    bert_tagger,
    distilbert_classifier,
    gemma2,
    gpt2,
    llama,
    qwen2,
    run,
    shake,
    t5,
    tokens,
)
from safetensors.torch import load_file

import slimtune

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
# With bias="all" peft writes the biases of a module trained whole a second time, under its wrapper's names.
TWICE = re.compile(r"\.(original_module|modules_to_save)\.")
QV = ["q_proj", "v_proj"]


def tied():
    return llama(tie=True)


CASES = {
    "plain": (llama, {}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
    "rslora": (llama, {"use_rslora": True, "lora_alpha": 16}),
    "patterns": (llama, {"target_modules": QV, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {
        r"layers\.1\.self_attn\.v_proj": 20, "q_proj": 6}}),
    "nested-patterns": (llama, {"target_modules": [*QV, "up_proj"], "rank_pattern": {"0.self_attn.q_proj": 2,
        "q_proj": 5, "mlp.up_proj": 7}, "use_rslora": True}),
    "modules-to-save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "two-modules-to-save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms-to-save": (llama, {"target_modules": QV, "modules_to_save": ["input_layernorm", "norm"]}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-head-saved": (tied, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "tied-embedding": (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head-adapted": (tied, {"target_modules": ["lm_head"]}),
    "exclude": (llama, {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]}),
    "layers": (llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "regex": (llama, {"target_modules": r".*layers\.0\..*(q|up)_proj"}),
    "gaussian": (llama, {"init_lora_weights": "gaussian"}),
    "random": (llama, {"init_lora_weights": False}),
    "gpt2": (gpt2, {}),
    "gpt2-bias-all": (gpt2, {"target_modules": "all-linear", "bias": "all"}),
    "gpt2-bias-lora": (gpt2, {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "gpt2-positions": (gpt2, {"target_modules": ["wpe", "wte", "c_attn"]}),
    "qwen2": (qwen2, {"bias": "lora_only"}),
    "gemma2": (gemma2, {"target_modules": "all-linear"}),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all": (t5, {"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear", "use_rslora": True}),
    "bert-seq-cls": (bert_classifier, {"task_type": "SEQ_CLS"}),
    "bert-seq-cls-bias": (bert_classifier, {"task_type": "SEQ_CLS", "bias": "all", "target_modules": "all-linear"}),
    "distilbert-seq-cls": (distilbert_classifier, {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    "bert-token-cls": (bert_tagger, {"task_type": "TOKEN_CLS", "r": 2}),
    "bert-encoder": (bert_encoder, {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "dense"]}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)


def pair(case, seed=1, **more):
    """Return ours and peft's, made from one seed."""
    make, settings = CASES[case]
    models = []
    for home in (slimtune, peft):
        base = make()
        torch.manual_seed(seed)
        models.append(home.get_peft_model(base, home.LoraConfig(**{**settings, **more})).eval())
    return models


def far(a, b):
    """Return the largest difference of two answers, as they are and as log-probabilities."""
    return max((a - b).abs().max().item(), (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item())


@EVERY
def test_one_seed_gives_one_adapter_bit_for_bit(case):
    ours, theirs = pair(case)
    mine = slimtune.get_peft_model_state_dict(ours)
    other = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    other = {k: t for k, t in other.items() if not TWICE.search(k)}
    assert set(mine) == set(other)
    assert all(torch.equal(mine[k], other[k]) and mine[k].dtype == other[k].dtype for k in mine)
    assert far(run(ours), run(theirs)) < CLOSE
    trained = ours.get_nb_trainable_parameters()[0]
    assert trained == theirs.get_nb_trainable_parameters()[0]


@EVERY
def test_saved_there_is_loaded_here(case, tmp_path):
    _, theirs = pair(case)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = slimtune.PeftModel.from_pretrained(CASES[case][0](), tmp_path)
    assert far(run(theirs), run(CASES[case][0]())) > 1e-3
    assert far(run(ours), run(theirs)) < CLOSE
    expected = run(ours)
    ours.merge_adapter()
    assert far(run(ours), expected) < CLOSE


@EVERY
def test_saved_here_is_loaded_there(case, tmp_path):
    ours, theirs = pair(case)
    shake(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    files = [set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")]
    assert files[0] == {k for k in files[1] if not TWICE.search(k)}
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    # Notes of the library's own, and what each finds out by itself when it attaches.
    apart = {"auto_mapping", "peft_version", "modules_to_save", "target_modules", "fan_in_fan_out"}
    shared = set(configs[0]) & set(configs[1]) - apart
    shared |= {"target_modules"} if CASES[case][1].get("target_modules") not in (None, "all-linear") else set()
    assert {k: _sorted(configs[0][k]) for k in shared} == {k: _sorted(configs[1][k]) for k in shared}
    loaded = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path / "ours").eval()
    assert far(run(ours), run(CASES[case][0]())) > 1e-3
    assert far(run(ours), run(loaded)) < CLOSE


def _sorted(value):
    return sorted(value) if isinstance(value, list) else value


def losses(model, ids, steps=5):
    """Return the losses of some AdamW steps."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for at in range(steps):
        inputs = {"input_ids": ids[at], "labels": ids[at]}
        if "bert" in model.config.model_type:
            inputs["labels"] = ids[at] % 3 if "Token" in type(model).__name__ else ids[at][:, 0] % 3
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("case", [c for c in CASES if c != "bert-encoder"])
def test_a_changed_import_changes_no_curve(case):
    ours, theirs = pair(case)
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the base's own; what is left to compare is the adapter
    ids = [tokens(seed=s) for s in range(5)]
    curve = losses(ours, ids)
    assert curve[0] != curve[-1]
    assert curve == pytest.approx(losses(theirs, ids), abs=CLOSE, rel=0)
    assert far(run(ours.eval()), run(theirs.eval())) < 1e-7


def test_lora_dropout_draws_as_pefts():
    ours, theirs = pair("plain", lora_dropout=0.3)
    curves = []
    for model in (ours, theirs):
        torch.manual_seed(9)
        curves.append(losses(model, [tokens(seed=s) for s in range(5)]))
    assert curves[0] == pytest.approx(curves[1], abs=CLOSE, rel=0)


def test_several_adapters_as_in_peft():
    models = []
    for home in (slimtune, peft):
        model = home.get_peft_model(llama(), home.LoraConfig(target_modules=QV, init_lora_weights=False))
        torch.manual_seed(4)
        model.add_adapter("two", home.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False))
        models.append(model.eval())
    ours, theirs = models
    peft.set_peft_model_state_dict(theirs, slimtune.get_peft_model_state_dict(ours))
    assert far(run(ours), run(theirs)) < CLOSE
    for model in models:
        model.set_adapter("two")
    assert far(run(ours), run(theirs)) < CLOSE
    with ours.disable_adapter(), theirs.disable_adapter():
        assert far(run(ours), run(theirs)) < CLOSE
    for model in models:
        model.delete_adapter("two")
    assert ours.active_adapter == theirs.active_adapter == "default"
    assert far(run(ours), run(theirs)) < CLOSE
