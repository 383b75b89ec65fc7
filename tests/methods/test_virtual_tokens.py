"""Virtual tokens and prefixes with padding, packing, sliding windows, caches, mixed batches, starts from text, PEFT."""

from types import SimpleNamespace

import models_zoo as zoo
import peft
import pytest
import torch
import transformers as tf
from adapter_checks import assert_loads, distance, run_with
from models_zoo import gpt2, llama, run, shake, tokens

import slimtune
from slimtune import PeftModel, get_peft_model
from slimtune.core.config.method_settings import fill_recipe_defaults
from slimtune.errors import AdapterError, ConfigError, ModelError, TargetError, UsageError
from slimtune.extras.prompt_learning import neutral_text
from slimtune.methods.prefix_tuning.prefix_tuning_modules import (
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9
LORA = slimtune.LoraConfig(target_modules="all-linear")
ROWS = [tokens(1, n, seed=n) for n in (9, 3, 6)]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "projection": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 4}),
}


def mistral():
    torch.manual_seed(0)
    return tf.MistralForCausalLM(tf.MistralConfig(**zoo.DECODER, sliding_window=4)).double().eval()


BASES = {"llama": llama, "qwen2": zoo.qwen2, "gpt2": gpt2, "gemma2": zoo.gemma2, "mistral": mistral}
SHAPES = [(b, a) for b in BASES for a in ("sdpa", "eager") if (b, a) != ("gemma2", "sdpa")]
EVERY_KIND = pytest.mark.parametrize("kind", sorted(KINDS))
# Every shape, every kind on a sliding window, both sides of padding, both attentions of every kind.
EVERY_PAIR = pytest.mark.parametrize(("kind", "base", "attention", "side"), [
    ("prompt", "llama", "sdpa", "left"), ("prompt", "gpt2", "eager", "left"), ("prompt", "gemma2", "eager", "right"),
    ("prompt", "mistral", "sdpa", "left"), ("p_tuning", "qwen2", "eager", "left"),
    ("p_tuning", "mistral", "sdpa", "right"), ("prefix", "llama", "eager", "left"), ("prefix", "gpt2", "sdpa", "right"),
    ("prefix", "gemma2", "eager", "left"), ("prefix", "mistral", "eager", "right"),
    ("projection", "qwen2", "sdpa", "right"), ("projection", "gemma2", "eager", "left"),
    ("adaption", "llama", "sdpa", "right"), ("adaption", "gpt2", "eager", "left"),
    ("adaption", "mistral", "sdpa", "left"),
])  # fmt: skip


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Eager attention, and peft's, round their softmax to fp32 whatever the model's dtype is."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))


def config(kind, **more):
    cls, settings = KINDS[kind]
    return getattr(slimtune, cls)(**{**settings, **more})


def adapted(kind, base="llama", attention=None, **more):
    model = BASES[base]()
    if attention:
        model.set_attn_implementation(attention)
    return shake(get_peft_model(model, config(kind, **more))).eval()


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def pad(rows, side):
    """Rows as one batch, padded to one length, and its mask."""
    width = max(r.shape[1] for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def learned(model, name="default"):
    return slimtune.get_peft_model_state_dict(model, adapter_name=name)["prompt_embeddings"]


# --- a batch is each row alone ----------------------------------------------------------------------------------------


@EVERY_PAIR
def test_padded_rows_without_positions(kind, base, attention, side):
    if kind == "adaption":
        pytest.skip(
            "its keys are not rotated: the output depends on positions, which transformers counts from the pads"
        )
    model = adapted(kind, base, attention)
    ids, mask = pad(ROWS, side)
    together = logits(model, ids, attention_mask=mask)
    for i, row in enumerate(ROWS):
        assert distance(together[i][mask[i].bool()], logits(model, row)[0]) < CLOSE


MIXED = ["prefix2", "default", "__base__", "lora", "prefix", "prompt2", "adaption"]


def mixed(base, attention=None):
    """A model with two prompts, two prefixes, gated prompts and a LoRA."""
    model = adapted("prompt", base, attention)
    more = {"prompt2": config("prompt", num_virtual_tokens=2), "prefix": config("prefix"),
            "prefix2": config("projection"), "adaption": config("adaption"), "lora": LORA}  # fmt: skip
    for seed, (name, adapter) in enumerate(more.items()):
        model.add_adapter(name, adapter)
        model.set_adapter(name)
        shake(model, seed=seed)
    return model.eval()


@pytest.mark.parametrize(("base", "attention", "side"), [(*s, ("left", "right")[i % 2]) for i, s in enumerate(SHAPES)])
def test_mixed_padded_and_packed_rows_equal_rows_alone(base, attention, side):
    model = mixed(base, attention)
    rows = [tokens(1, n, seed=n) for n in (9, 3, 6, 8, 2, 7, 5)]
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # the position of a pad does not matter
    together = logits(model, ids, attention_mask=mask, position_ids=positions, adapter_names=MIXED)
    packed = torch.cat(ROWS, dim=1).expand(len(MIXED), -1)
    positions = torch.cat([torch.arange(r.shape[1]) for r in ROWS]).expand(len(MIXED), -1)
    packs = logits(model, packed, position_ids=positions, use_cache=False, adapter_names=MIXED)
    for i, (row, name) in enumerate(zip(rows, MIXED, strict=True)):
        alone, *parts = run_with(model, name, lambda row=row: [logits(model, r)[0] for r in (row, *ROWS)])
        assert distance(together[i][mask[i].bool()], alone) < CLOSE, name
        assert distance(packs[i], torch.cat(parts)) < CLOSE, name


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"])
def test_mixed_rows_generate_as_alone(base):
    model = mixed(base)
    ids, mask = tokens(7, 5), torch.ones(7, 5, dtype=torch.long)
    mask[1::2, :2] = 0
    settings = {"max_new_tokens": 4, "num_beams": 2, **GREEDY}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=MIXED, **settings)
    for i, name in enumerate(MIXED):
        row = {"input_ids": ids[i : i + 1, 2 * (i % 2) :], "attention_mask": mask[i : i + 1, 2 * (i % 2) :]}
        for cache in (True, False):
            alone = run_with(model, name, lambda row=row, c=cache: model.generate(**row, use_cache=c, **settings))
            assert torch.equal(together[i, 5:], alone[0, -4:]), name


# --- a cache changes nothing ------------------------------------------------------------------------------------------


@EVERY_PAIR
def test_step_by_step_equals_at_once(kind, base, attention, side):
    model = adapted(kind, base, attention)
    ids, mask = pad([tokens(1, 12, seed=4), tokens(1, 9, seed=5)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache, parts = tf.DynamicCache(config=model.config), []
    for a, b in [(0, 5), (5, 6), (6, 9), (9, 10), (10, 12)]:
        inputs = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        parts.append(logits(model, ids[:, a:b], **inputs, past_key_values=cache, use_cache=True))
    assert (torch.cat(parts, dim=1) - whole)[mask.bool()].abs().max() < CLOSE


@EVERY_KIND
def test_steps_without_mask_or_positions(kind):
    model, ids = adapted(kind), tokens(2, 9)
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    assert distance(torch.cat([first.logits, second.logits], dim=1), logits(model, ids)) < CLOSE


@EVERY_KIND
def test_generate_continues_from_its_cache(kind):
    model = adapted(kind)
    first = model.generate(input_ids=tokens(1, 5), max_new_tokens=3, **GREEDY, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, tokens(1, 4, seed=9)], dim=1)
    expected = model.generate(input_ids=whole, max_new_tokens=3, **GREEDY)
    new = whole[:, first.sequences.shape[1] - 1 :]
    cached = {"attention_mask": torch.ones_like(whole), "past_key_values": first.past_key_values}
    continued = model.generate(input_ids=new, **cached, max_new_tokens=3, **GREEDY)
    assert torch.equal(continued[:, -3:], expected[:, -3:])


@EVERY_KIND
def test_prompt_lookup_is_greedy(kind):
    """Prompt lookup decoding gives several tokens at once and removes some from the cache again."""
    model = adapted(kind)
    ids, settings = tokens(1, 4).repeat(1, 3), {"max_new_tokens": 12, **GREEDY}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix", "projection"])
def test_other_caches_are_refused(kind):
    model = adapted(kind)
    with model.disable_adapter(), torch.no_grad():
        cache = model(input_ids=tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(UsageError, match="cache"):
        model(input_ids=tokens(2, 1), past_key_values=cache)
    if kind in ("prompt", "p_tuning"):  # the whole sequence beside a cache of its beginning
        first = model.generate(input_ids=tokens(1, 5), max_new_tokens=2, **GREEDY, return_dict_in_generate=True)
        whole = torch.cat([first.sequences, tokens(1, 12)], dim=1)
        with pytest.raises(UsageError):
            model.generate(input_ids=whole, past_key_values=first.past_key_values, max_new_tokens=2, **GREEDY)


@EVERY_KIND
@pytest.mark.parametrize(("base", "lengths"), [("llama", (6, 4)), ("gemma2", (6, 6)), ("gemma2", (6, 4))])
def test_static_cache_works_or_is_refused(kind, base, lengths):
    model = adapted(kind, base)
    ids, mask = pad([tokens(1, n, seed=n) for n in lengths], "left")
    settings = {"max_new_tokens": 5, "attention_mask": mask, **GREEDY}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    if kind in ("prompt", "p_tuning"):
        with pytest.raises(UsageError, match="cache"):
            model.generate(input_ids=ids, cache_implementation="static", **settings)
        return
    static, dynamic = (model.generate(input_ids=ids, cache_implementation=c, **settings) for c in ("static", None))
    assert torch.equal(static.sequences, dynamic.sequences)
    assert distance(torch.stack(static.logits), torch.stack(dynamic.logits)) < CLOSE


# --- several adapters, masks, outputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize(("base", "attention"), [("llama", "sdpa"), ("gpt2", "eager"), ("mistral", "sdpa")])
def test_two_adapters_equal_one_with_both_prompts(kind, base, attention):
    model = adapted(kind, base, attention)
    model.add_adapter("second", config(kind, num_virtual_tokens=2))
    model.set_adapter(["default", "second"])
    one = adapted(kind, base, attention, num_virtual_tokens=7)
    joined = torch.cat([learned(model), learned(model, "second")])
    slimtune.set_peft_model_state_dict(one, {"prompt_embeddings": joined})
    assert distance(logits(model, ROWS[0]), logits(one, ROWS[0])) < CLOSE


@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_prefix_comes_before_a_prompt(base):
    """Both together equal a prefix alone over the prompt's embeddings and the tokens'."""
    model = mixed(base)
    model.set_adapter(["prefix", "default"])
    together = logits(model, ROWS[0])
    model.set_adapter(["default", "prefix"])
    assert distance(logits(model, ROWS[0]), together) < CLOSE
    prompt = learned(model)
    embeds = torch.cat([prompt[None], model.get_input_embeddings()(ROWS[0])], dim=1)
    model.set_adapter("prefix")
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits[:, len(prompt) :]
    assert distance(together, expected) < CLOSE


@EVERY_KIND
def test_a_lora_beside_equals_the_lora_merged(kind):
    model = adapted(kind)
    model.add_adapter("lora", LORA)
    model.set_adapter("lora")
    shake(model)
    model.set_adapter(["lora", "default"])
    together = logits(model, ROWS[0])
    assert distance(together, logits(adapted(kind), ROWS[0])) > 1e-4
    lora = get_peft_model(llama(), LORA)
    slimtune.set_peft_model_state_dict(lora, slimtune.get_peft_model_state_dict(model, adapter_name="lora"))
    merged = get_peft_model(lora.merge_and_unload(), config(kind)).eval()
    slimtune.set_peft_model_state_dict(merged, slimtune.get_peft_model_state_dict(model))
    assert distance(together, logits(merged, ROWS[0])) < CLOSE


@EVERY_KIND
def test_outputs_have_no_virtual_positions(kind):
    model = adapted(kind)
    ids, mask = pad(ROWS, "left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, labels=ids)
        as_tuple, backbone = (m(**inputs, return_dict=False) for m in (model, model.model))
        last = model(**inputs, logits_to_keep=torch.tensor([4, 8])).logits
    assert {s.shape[:2] for s in out.hidden_states} == {ids.shape}
    assert torch.equal(as_tuple[0], out.logits)
    assert torch.equal(backbone[0], out.hidden_states[-1])
    assert distance(last, out.logits[:, [4, 8]]) < CLOSE
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (out.loss - expected).abs() < 1e-5  # transformers computes it in fp32


@EVERY_KIND
def test_four_dimensional_mask_is_used(kind):
    model = adapted(kind)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = logits(model, ROWS[0])
    assert distance(logits(model, ROWS[0], attention_mask=seen[None, None]), expected) < CLOSE
    model.set_attn_implementation("eager")
    additive = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    assert distance(logits(model, ROWS[0], attention_mask=additive[None, None]), expected) < CLOSE
    seen[5:, 4] = False
    model.set_attn_implementation("sdpa")
    assert distance(logits(model, ROWS[0], attention_mask=seen[None, None])[:, 5:], expected[:, 5:]) > 1e-6


def classifier(make):
    sizes = {"vocab_size": zoo.VOCAB, "pad_token_id": 0, "num_labels": 3}
    sizes |= zoo.DECODER if "Llama" in make.__name__ else {"n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(0)
    return make(make.config_class(**sizes)).double().eval()


@EVERY_KIND
@pytest.mark.parametrize("make", [tf.LlamaForSequenceClassification, tf.GPT2ForSequenceClassification])
def test_a_classifier_reads_the_last_token(kind, make, tmp_path):
    model = shake(get_peft_model(classifier(make), config(kind, task_type="SEQ_CLS")).eval())
    ids, mask = pad(ROWS, "right")
    together = logits(model, ids, attention_mask=mask)
    for i, row in enumerate(ROWS):
        assert distance(together[i], logits(model, row)[0]) < CLOSE
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(classifier(make), tmp_path), ids, attention_mask=mask), together
    )


def test_gated_prompts_on_encoders_are_refused():
    for base in (zoo.t5(), zoo.bert_classifier()):
        with pytest.raises(ModelError, match=type(base).__name__):
            get_peft_model(base, config("adaption"))
        assert not isinstance(base, PeftModel)


@EVERY_KIND
def test_a_bare_backbone_is_adapted(kind):
    model, whole = get_peft_model(llama().model, config(kind)).eval(), adapted(kind)
    state = slimtune.get_peft_model_state_dict(whole)
    state = {k.replace("model.model.layers", "model.layers"): t for k, t in state.items()}
    slimtune.set_peft_model_state_dict(model, state)
    with torch.no_grad():
        assert torch.equal(model(ROWS[0]).last_hidden_state, whole.model(ROWS[0]).last_hidden_state)
    assert type(model.unload()) is tf.LlamaModel


def test_an_attention_without_prefixes_is_refused():
    model = adapted("prefix")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2"):
        logits(model, ROWS[0])


# --- starts from text -------------------------------------------------------------------------------------------------

TEXT = "lexicographer"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def text_ids(tokenizer):
    return tf.AutoTokenizer.from_pretrained(tokenizer)(TEXT, return_tensors="pt")["input_ids"]


def logits_after_text(model, tokenizer):
    return logits(model, torch.cat([text_ids(tokenizer).expand(2, -1), tokens()], dim=1))[:, len(TEXT) :]


@pytest.mark.parametrize(("base", "attention"), SHAPES)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_start_from_text_answers_as_after_it(kind, base, attention, tokenizer):
    plain = BASES[base]()
    plain.set_attn_implementation(attention)
    expected = logits_after_text(plain, tokenizer)
    init = {"prompt": {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT},
            "prefix": {"prefix_tuning_init_text": TEXT}}[kind]  # fmt: skip
    settings = config(kind, num_virtual_tokens=len(TEXT), tokenizer_name_or_path=tokenizer, **init)
    model = get_peft_model(plain, settings).eval()
    assert distance(logits(model, tokens()), expected) < CLOSE
    assert distance(logits(model, tokens()), run(BASES[base]())) > 1e-4


def test_prefix_is_set_from_text_and_cache(tokenizer):
    plain = llama()
    expected = logits_after_text(plain, tokenizer)
    words = tf.AutoTokenizer.from_pretrained(tokenizer)
    with torch.no_grad():
        cache = plain(text_ids(tokenizer), use_cache=True).past_key_values
    model = shake(get_peft_model(plain, config("prefix", num_virtual_tokens=len(TEXT))).train())
    initialize_kv_prefix_from_text(model, words, text=TEXT, use_chat_template=False)
    words.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="steps"):
        initialize_kv_prefix_from_text(model, words, text=TEXT)
    words.chat_template = None
    assert model.training
    assert distance(logits(model, tokens()), expected) < CLOSE
    shake(model)
    assert torch.equal(initialize_kv_prefix_from_past_key_values(model, past_key_values=cache), learned(model))
    assert distance(logits(model, tokens()), expected) < CLOSE
    with pytest.raises(ConfigError, match="13 tokens"):
        initialize_kv_prefix_from_text(model, words, text=TEXT, use_chat_template=False, num_virtual_tokens=14)
    with pytest.raises(UsageError, match="prefix_projection"):
        initialize_kv_prefix_from_text(adapted("projection"), words, text=TEXT)


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB"])
def test_starts_equal_pefts(init, tokenizer):
    settings = {"prompt_tuning_init": init, "num_virtual_tokens": 7, "task_type": "CAUSAL_LM"}
    if init == "TEXT":
        settings |= {"prompt_tuning_init_text": "abc", "tokenizer_name_or_path": tokenizer}
    starts = []
    for library in (slimtune, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(zoo.gemma2(), library.PromptTuningConfig(**settings))
        starts.append(library.get_peft_model_state_dict(model)["prompt_embeddings"])
    assert torch.equal(starts[0].float(), starts[1])  # peft rounds them to fp32


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix", "projection"])
def test_neutral_start_answers_as_after_the_end_of_its_text(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(neutral_text, "NEUTRAL_TEXT", TEXT)
    settings = config(kind, num_virtual_tokens=6, neutral_start=True)
    initialize, words = settings.defer_initialization(), tf.AutoTokenizer.from_pretrained(tokenizer)
    model = get_peft_model(llama(), settings)
    initialize(model, SimpleNamespace(tokenizer=words), [])
    ids = text_ids(tokenizer)[:, -6:]
    expected = logits(llama(), torch.cat([ids.expand(2, -1), tokens()], dim=1))[:, 6:]
    assert distance(logits(model.eval(), tokens()), expected) < CLOSE


def test_neutral_start_outside_of_a_run_is_refused():
    with pytest.raises(ConfigError, match="neutral_start"):
        adapted("prefix", neutral_start=True)


def test_start_that_is_given_stays():
    for kind, given in (
        (slimtune.PrefixTuningConfig, {"init_weights": "vocab"}),
        (slimtune.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    ):
        assert not fill_recipe_defaults(given, kind)["neutral_start"]


@pytest.mark.parametrize(
    ("kind", "settings", "error"),
    [
        ("prompt", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, ConfigError),
        ("prompt", {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}, ConfigError),
        ("prompt", {"tokenizer_kwargs": {"use_fast": True}}, ConfigError),
        ("prompt", {"num_virtual_tokens": None}, ConfigError),
        ("prompt", {"num_transformer_submodules": 2}, ConfigError),
        ("p_tuning", {"token_dim": 16}, ConfigError),
        ("prefix", {"num_layers": 3}, ConfigError),
        ("prefix", {"token_dim": 32}, ConfigError),
        ("projection", {"prefix_tuning_init_text": "a", "tokenizer_name_or_path": "b"}, ConfigError),
        ("adaption", {"adapter_layers": 3}, TargetError),
        ("adaption", {"target_modules": "self_atn"}, TargetError),
    ],
)
def test_bad_settings_are_refused(kind, settings, error):
    with pytest.raises(error):
        logits(adapted(kind, **settings), ROWS[0])


# --- encoders, and peft -----------------------------------------------------------------------------------------------

ENCODERS = {
    "mlp": ("PromptEncoderConfig", {}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True}),
}
EVERY_ENCODER = pytest.mark.parametrize("encoder", sorted(ENCODERS))


def with_encoder(library, base, encoder):
    cls, settings = ENCODERS[encoder]
    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "encoder_hidden_size": 12, **settings}
    return library.get_peft_model(BASES[base](), getattr(library, cls)(**settings)).eval()


def gradients(model):
    ids = tokens()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    out.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("encoder", "base"),
    [("mlp", "llama"), ("mlp", "gemma2"), ("lstm", "gpt2"), ("lstm", "qwen2"), ("projection", "llama"),
     ("projection", "gpt2"), ("projection", "gemma2")],
)  # fmt: skip
def test_encoders_equal_pefts(encoder, base, tmp_path):
    ours, theirs = with_encoder(slimtune, base, encoder), with_encoder(peft, base, encoder)
    theirs.prompt_encoder.double()
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))
    ids = tokens()
    expected = logits(theirs, ids)[:, -ids.shape[1] :]
    assert distance(logits(ours, ids), expected) < CLOSE
    assert all(distance(a, b) < CLOSE for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert distance(logits(PeftModel.from_pretrained(BASES[base](), tmp_path), ids), expected) < CLOSE
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(BASES[base](), tmp_path).eval()
    assert distance(logits(back, ids)[:, -ids.shape[1] :], expected) < 1e-6  # fp32 in peft


@EVERY_ENCODER
def test_without_its_encoder_a_table_trains(encoder, tmp_path):
    with_encoder(peft, "llama", encoder).save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1
    assert trained[0].endswith("prompt_encoder.embedding.weight")
    assert gradients(model)[0].abs().max() > 0
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(llama(), tmp_path).parameters())
    with pytest.raises(AdapterError, match="missing"):
        slimtune.set_peft_model_state_dict(model, {})


def test_encoder_dropout_does_not_reach_the_file():
    model = with_encoder(slimtune, "llama", "lstm").train()
    encoder = model.model.adapters["default"].prompt_encoder
    encoder.lstm_head.dropout = 0.5
    assert torch.equal(learned(model), learned(model))
    assert encoder.training


@pytest.mark.parametrize("base", ["llama", "mistral", "gpt2"])
def test_adaption_prompts_equal_pefts(base, tmp_path):
    settings = {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
    ours, theirs = (
        library.get_peft_model(BASES[base](), library.AdaptionPromptConfig(**settings)).eval()
        for library in (slimtune, peft)
    )
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "default", is_trainable=True)
    assert distance(logits(ours, tokens()), run(BASES[base]())) > 1e-3
    assert distance(logits(ours, tokens()), logits(theirs, tokens())) < CLOSE
    assert all(distance(a, b) < CLOSE for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    assert_loads(ours, BASES[base], tmp_path / "ours")


def test_pefts_classifier_is_read_and_written(tmp_path):
    def make():
        return classifier(tf.LlamaForSequenceClassification).float()

    theirs = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(make(), tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    said = [logits(model, tokens(), attention_mask=torch.ones_like(tokens())) for model in (ours, theirs, back)]
    assert max(distance(said[0], other) for other in said[1:]) < 1e-5
