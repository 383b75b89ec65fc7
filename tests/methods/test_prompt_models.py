"""Virtual tokens and prefixes on encoders, encoder-decoders and heads that call a part of their backbone: PEFT's."""

import peft
import pytest
import torch
import transformers as tf
from models_zoo import (
    DECODER,
    ENCODER,
    VOCAB,
    bert_classifier,
    bert_encoder,
    bert_tagger,
    distilbert_classifier,
    gpt2,
    roberta_classifier,
    shake,
    t5,
    tokens,
)  # fmt: skip

import slimtune
from slimtune import PeftModel, get_peft_model
from slimtune.errors import ConfigError, ModelError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
CLOSE = 1e-12
BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 3,
        "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
PLACES = {"max_position_embeddings": 64}
SIZES = {k: v for k, v in ENCODER.items() if k != "num_labels"}
OPT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
NOISE = {"max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8}
VISION = {"text_config": tf.LlamaConfig(**DECODER),
          "vision_config": tf.CLIPVisionConfig(**SIZES, image_size=28, patch_size=14)}  # fmt: skip
BLOOM = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MAKE = {
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, **PLACES, word_embed_proj_dim=32)),
    "trocr": lambda: tf.TrOCRForCausalLM(tf.TrOCRConfig(**{k: v for k, v in BART.items() if "encoder" not in k})),
    "bart head": lambda: tf.BartForCausalLM(tf.BartConfig(**BART, **PLACES)),
    "marian head": lambda: tf.MarianForCausalLM(tf.MarianConfig(**BART, **PLACES)),
    "pegasus head": lambda: tf.PegasusForCausalLM(tf.PegasusConfig(**BART, **PLACES)),
    "whisper head": lambda: tf.WhisperForCausalLM(tf.WhisperConfig(**BART, **NOISE)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**BLOOM)),
    "llava": lambda: tf.LlavaForConditionalGeneration(tf.LlavaConfig(**VISION)),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "t5": t5,
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART, **PLACES)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**BART, **PLACES)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**BART, **PLACES, scale_embedding=True)),
    "bert": bert_classifier,
    "bert encoder": bert_encoder,
    "bert tagger": bert_tagger,
    "roberta": roberta_classifier,
    "deberta": lambda: tf.DebertaV2ForTokenClassification(tf.DebertaV2Config(**ENCODER)),
    "electra": lambda: tf.ElectraForQuestionAnswering(tf.ElectraConfig(**SIZES, embedding_size=32)),
    "t5 encoder": lambda: tf.T5EncoderModel(t5().config),
}
KINDS = {
    "prompt": ("PromptTuningConfig", {}),
    "p_tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True}),
}
TASKS = {"ConditionalGeneration": "SEQ_2_SEQ_LM", "MTModel": "SEQ_2_SEQ_LM", "SequenceClassification": "SEQ_CLS",
         "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS", "CausalLM": "CAUSAL_LM"}  # fmt: skip
# PEFT finds no sizes for TrOCR, and refuses prefixes on encoders with a head.
EQUAL_PEFT = [
    ("opt", "prompt"), ("opt", "prefix"), ("trocr", "p_tuning"), ("trocr", "prefix"), ("bart head", "prompt"),
    ("bart head", "prefix"), ("marian head", "prompt"), ("marian head", "prefix"), ("marian head", "projection"),
    ("pegasus head", "prompt"), ("pegasus head", "prefix"), ("pegasus head", "p_tuning"), ("whisper head", "prompt"),
    ("whisper head", "prefix"), ("bloom", "prefix"), ("bloom", "p_tuning"), ("neox", "prefix"), ("llava", "prompt"),
    ("t5", "prompt"), ("t5", "p_tuning"), ("t5", "prefix"), ("t5", "projection"), ("bart", "prompt"),
    ("bart", "prefix"), ("marian", "prompt"), ("marian", "prefix"), ("pegasus", "p_tuning"), ("pegasus", "prefix"),
    ("bert", "prompt"),
    ("bert encoder", "prompt"), ("bert encoder", "prefix"), ("bert encoder", "projection"), ("bert tagger", "p_tuning"),
    ("roberta", "prompt"),
    ("deberta", "prompt"), ("electra", "p_tuning"), ("t5 encoder", "prompt"),
]  # fmt: skip


def make(base):
    torch.manual_seed(0)
    return MAKE[base]().double().eval()


def config(library, model, kind, **more):
    cls, settings = KINDS[kind]
    task = next((t for ending, t in TASKS.items() if type(model).__name__.endswith(ending)), "FEATURE_EXTRACTION")
    if isinstance(model, tf.LlavaForConditionalGeneration):
        task = "CAUSAL_LM"
    if isinstance(model, tf.TrOCRForCausalLM):
        more |= {"num_attention_heads": 4, "num_layers": 3, "token_dim": 32}
    return getattr(library, cls)(**{"num_virtual_tokens": 3, "task_type": task, **settings, **more})


def adapted(base, kind, **more):
    model = make(base)
    return shake(get_peft_model(model, config(slimtune, model, kind, **more)).eval())


def inputs(model):
    """Two rows, the second one padded on the right."""
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        found |= {"decoder_input_ids": ids[:, :4], "decoder_attention_mask": mask[:, 3:]}
    if model.config.model_type == "bert" and model.config.num_labels == 3:
        found["token_type_ids"] = (torch.arange(7) > 3).long().expand(2, -1)
    return found


def answer(model, given):
    """Return what a model says about its tokens: PEFT's positions of virtual tokens come first."""
    out = model(**given)
    said = next(v for n in ("logits", "start_logits", "last_hidden_state") if (v := getattr(out, n, None)) is not None)
    return said if said.dim() < 2 or said.shape[1] < 7 else said[:, -7:]


@pytest.mark.parametrize(("base", "kind"), EQUAL_PEFT)
def test_logits_gradients_and_files_equal_pefts(base, kind, tmp_path):
    model = make(base)
    theirs = shake(peft.get_peft_model(model, config(peft, model, kind)).eval())
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    given = inputs(theirs)
    seen = given["decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask"].bool()
    ours = PeftModel.from_pretrained(make(base), tmp_path / "theirs", is_trainable=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(base), tmp_path / "ours").eval()
    said = [answer(m, given) for m in (ours, theirs, back)]
    said = [s[seen] if s.shape[:2] == seen.shape else s for s in said]
    with ours.disable_adapter():
        disabled = answer(ours, given)
    assert (disabled - answer(make(base), given)).abs().max() < CLOSE
    assert (answer(ours, given) - disabled).abs().max() > 1e-6
    close = CLOSE if kind in ("prompt", "prefix") else 1e-6  # PEFT stores what a network computed in fp32
    assert max((said[0] - other).abs().max() for other in said[1:]) < close
    if kind in ("prompt", "prefix"):  # the others load as tables
        for s in said[:2]:
            s.pow(3).sum().backward()
        expected = theirs.prompt_encoder.default.embedding.weight.grad  # in fp32
        assert torch.allclose(ours.prompt_encoder.default.embedding.weight.grad.float(), expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-6


GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("base", "kind"),
    [("t5", "prompt"), ("t5", "prefix"), ("bart", "p_tuning"), ("bart", "prefix"), ("bloom", "prefix"),
     ("whisper head", "prefix"), ("opt", "prefix")],
)  # fmt: skip
def test_generation_with_a_cache_equals_generation_without(base, kind):
    model = adapted(base, kind)
    given = {n: v for n, v in inputs(model).items() if not n.startswith("decoder")}
    if not model.config.is_encoder_decoder:
        given["attention_mask"] = given["attention_mask"].flip(1)
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**given, **settings, use_cache=c) for c in (True, False))
    assert torch.allclose(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-6)
    beams = [model.generate(**given, **GREEDY, num_beams=2, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("base", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_sequence_to_sequence_losses_equal_pefts(base, kind, tmp_path):
    model = make(base).float()
    theirs = shake(peft.get_peft_model(model, config(peft, model, kind)).eval())
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(make(base).float(), tmp_path).eval()
    given = {n: v for n, v in inputs(ours).items() if not n.startswith("decoder")} | {"labels": tokens(2, 4, seed=1)}
    assert torch.equal(ours(**given).loss, theirs(**given).loss)
    if kind == "prompt":  # with this transformers, PEFT 0.21.2 generates from a prefix other logits than it computes
        assert torch.equal(ours.generate(**given, **GREEDY), theirs.generate(**given, **GREEDY))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_token_labels_belong_to_the_tokens(kind):
    model, labels = adapted("bert tagger", kind), tokens(2, 7) % 3
    out = model(**inputs(model), labels=labels)
    assert out.logits.shape == (2, 7, 3)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(("base", "kind"), [("bert", "prefix"), ("bert encoder", "prompt"), ("t5 encoder", "prompt")])
def test_a_padded_row_of_an_encoder_equals_the_row_alone(base, kind):
    model = adapted(base, kind, task_type=None)
    given = inputs(model)
    alone = {n: v[1:, :5] for n, v in given.items()}
    assert (model(**given)[0][1][:5] - model(**alone)[0][0]).abs().max() < 1e-9


def test_pefts_attributes_of_a_model_with_virtual_tokens():
    t5_model, opt = adapted("t5", "prompt"), adapted("opt", "prefix")
    assert t5_model.get_prompt(2).shape == (2, 6, 32)
    assert torch.equal(t5_model.get_prompt_embedding_to_save("default"), t5_model.get_prompt(1)[0])
    assert t5_model.prompt_tokens["default"].tolist() == list(range(6))
    assert t5_model.word_embeddings.weight is t5_model.shared.weight
    assert opt.get_prompt(2).layers[1].keys.shape == (2, 4, 3, 8)
    with pytest.raises(AttributeError):
        get_peft_model(gpt2(), slimtune.LoraConfig()).prompt_encoder  # noqa: B018


@pytest.mark.parametrize(
    ("base", "kind", "more", "error"),
    [
        (MAKE["deberta"], "prefix", {}, ModelError),
        (MAKE["t5 encoder"], "prefix", {}, ModelError),
        (distilbert_classifier, "projection", {}, ModelError),
        (lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)), "prompt", {},
         ModelError),
        (gpt2, "prompt", {"task_type": "SEQ_2_SEQ_LM"}, ConfigError),
        (t5, "prefix", {"init_weights": "vocab"}, ConfigError),
    ],
)  # fmt: skip
def test_models_without_a_place_for_them_are_refused(base, kind, more, error):
    model = base()
    with pytest.raises(error):
        get_peft_model(model, config(slimtune, model, kind, **more))
    assert not isinstance(model, PeftModel)


def test_calls_that_cannot_have_a_prefix_are_refused():
    for base, kind in (("bert", "prompt"), ("bert", "prefix"), ("bart head", "prompt")):
        model = adapted(base, kind)
        with pytest.raises(UsageError, match="set_adapter"):
            model(**inputs(model), adapter_names=["default", "__base__"])
    model = adapted("t5", "prefix").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="checkpointing"):
        model(**inputs(model))


def test_a_backbone_that_is_never_called_is_reported():
    class Shortcut(tf.GPT2LMHeadModel):
        def forward(self, input_ids, **kwargs):
            return self.lm_head(self.transformer.wte(input_ids))

    model = get_peft_model(Shortcut(gpt2().config), slimtune.PromptTuningConfig(num_virtual_tokens=3))
    with pytest.raises(ModelError, match="transformer"):
        model(input_ids=tokens())
