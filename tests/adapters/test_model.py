"""Tied heads, modules trained whole, biases, odd embeddings, AutoPeftModel."""

import peft
import pytest
import torch
import transformers as tf
from models_zoo import (
    bert_classifier,
    bert_encoder,
    bert_tagger,
    gemma3,
    gpt2,
    llama,
    roberta_classifier,
    run,
    same_base,
    shake,
    snapshot,
    t5,
)

import slimtune
from slimtune import LoraConfig, PeftModel, get_peft_model
from slimtune.adapters.base import MergeUnsupported
from slimtune.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def shaken(base, **settings):
    model = get_peft_model(base, LoraConfig(**settings))
    shake(model)
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_a_tied_head_merges_apart_from_the_embedding(settings, tmp_path):
    model = shaken(llama(tie=True), **settings)
    expected, before = run(model), snapshot(llama(tie=True))
    assert same_base(model, before)
    touched = {*settings["target_modules"], *settings.get("modules_to_save", [])}
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9
    for name, weight in (("embed_tokens", model.model.embed_tokens.weight), ("lm_head", model.lm_head.weight)):
        assert torch.equal(weight, before["model.embed_tokens.weight"]) != (name in touched)
    model.unmerge_adapter()
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert torch.equal(run(model), expected)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (run(again) - expected).abs().max() < 1e-9


def test_a_tied_head_stays_tied_where_nothing_touches_it(tmp_path):
    plain = shaken(llama(tie=True), target_modules=["q_proj"]).merge_and_unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    unloaded = shaken(llama(tie=True), target_modules=["lm_head"], modules_to_save=["embed_tokens"]).unload()
    assert unloaded.config.tie_word_embeddings is True
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight
    assert torch.equal(run(unloaded), run(llama(tie=True)))


def test_a_scaled_embedding_scales_the_change():
    model = shaken(gemma3(), target_modules=["embed_tokens"], r=4)
    expected = run(model)
    assert (expected - run(gemma3())).abs().max() > 1e-3
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), run(gemma3()))
    torch.manual_seed(1)
    theirs = peft.get_peft_model(gemma3(), peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    torch.manual_seed(1)
    ours = get_peft_model(gemma3(), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    assert (run(ours.eval()) - run(theirs.eval())).abs().max() < 1e-9


@pytest.mark.parametrize("make", [bert_classifier, roberta_classifier, bert_tagger])
def test_a_head_trained_whole(make, tmp_path):
    kind = "TOKEN_CLS" if make is bert_tagger else "SEQ_CLS"
    model = shaken(make(), task_type=kind)
    expected, before = run(model), snapshot(make())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("classifier.") and ".trained_copies.default." in n for n in trained)
    assert same_base(model, before)
    with model.disable_adapter():
        assert torch.equal(run(model), run(make()))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make(), tmp_path)), expected)
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9
    model.unmerge_adapter()
    assert same_base(model, before)
    plain = model.merge_and_unload()
    assert set(plain.state_dict()) == set(make().state_dict())
    assert (run(plain) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("make", [gpt2, bert_classifier])
def test_biases(make, bias):
    model = shaken(make(), bias=bias)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(bias=bias))
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    expected, before = run(model), snapshot(make())
    assert same_base(model, before)
    with model.disable_adapter():
        assert torch.equal(run(model), run(make()))
    model.merge_adapter()
    assert (run(model) - expected).abs().max() < 1e-9
    assert same_base(model.unload(), before)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("make", [llama, gpt2, t5, bert_encoder])
def test_the_count_is_printed_in_pefts_words(make, bias, capsys):
    get_peft_model(make(), LoraConfig(r=4)).print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.get_peft_model(make(), peft.LoraConfig(r=4)).print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert ours.startswith("trainable params: ")


def test_an_adapter_that_is_not_finite_does_not_merge():
    model = shaken(llama(), target_modules=["q_proj", "v_proj"])
    before = snapshot(llama())
    next(p for n, p in model.named_parameters() if "layers.1" in n and "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(MergeUnsupported, match="contains NaN or Inf after merging"):
        model.merge_adapter(safe_merge=True)
    assert same_base(model, before)
    assert torch.isnan(run(model)).any()


def test_what_a_merge_put_by_follows_the_model():
    model = shaken(llama(tie=True), target_modules=["lm_head", "q_proj"])
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same_base(model, snapshot(llama(tie=True).float()))


def test_an_adapter_added_beside_a_merged_one_starts_from_the_base():
    model = shaken(llama(), target_modules=["q_proj", "lm_head"])
    model.merge_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    model.unmerge_adapter()
    model.set_adapter("other")
    assert torch.equal(run(model), run(llama()))


AUTO = [
    (llama, "CausalLM", "CAUSAL_LM"),
    (t5, "Seq2SeqLM", "SEQ_2_SEQ_LM"),
    (bert_classifier, "SequenceClassification", "SEQ_CLS"),
    (bert_tagger, "TokenClassification", "TOKEN_CLS"),
    (bert_encoder, "FeatureExtraction", "FEATURE_EXTRACTION"),
]


@pytest.mark.parametrize(("make", "kind", "task"), AUTO, ids=[a[1] for a in AUTO])
def test_one_call_loads_base_and_adapter(make, kind, task, tmp_path):
    make().save_pretrained(tmp_path / "base")
    loader = tf.AutoModel if kind == "FeatureExtraction" else getattr(tf, f"AutoModelFor{kind}")
    base = loader.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = shaken(base, task_type=task)
    expected = run(model)
    model.save_pretrained(tmp_path / "adapter")
    auto = getattr(slimtune, f"AutoPeftModelFor{kind}")
    again = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert isinstance(again, PeftModel)
    assert torch.equal(run(again), expected)
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    theirs = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert (run(theirs.eval()) - expected).abs().max() < 1e-9


def test_an_adapter_without_a_base_name_is_said(tmp_path):
    get_peft_model(llama(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="does not name its base"):
        slimtune.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_generate_uses_the_adapter():
    model = shaken(llama(), target_modules="all-linear")
    ids = torch.tensor([[1, 5, 9]])
    cached = model.generate(ids, max_new_tokens=6, do_sample=False)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    with model.disable_adapter():
        assert torch.equal(
            model.generate(ids, max_new_tokens=6, do_sample=False),
            llama().generate(ids, max_new_tokens=6, do_sample=False),
        )
