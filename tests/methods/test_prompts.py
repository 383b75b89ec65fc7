"""Learned positions and prefixes where sequences get hard: padding, packs, windows, caches, mixed rows, text, peft."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from models_zoo import DECODER, VOCAB, bert_classifier, gemma2, gpt2, llama, qwen2, run, shake, t5, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

import slimtune
from slimtune import PeftModel, get_peft_model
from slimtune.config.method import resolved
from slimtune.errors import AdapterError, ConfigError, ModelError, TargetError, UsageError
from slimtune.methods.prefix_tuning.from_text import (
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
CLOSE = 1e-9


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch):
    """Eager attention, and peft's, round their softmax to fp32 whatever the model is."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))


KINDS = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "projection": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 4}),
}


def mistral():
    torch.manual_seed(0)
    return tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=4)).double().eval()


BASES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "gemma2": gemma2, "mistral": mistral}
SHAPES = [(b, a) for b in BASES for a in ("sdpa", "eager") if (b, a) != ("gemma2", "sdpa")]
EVERY_SHAPE = pytest.mark.parametrize(("base", "attention"), SHAPES)
EVERY_KIND = pytest.mark.parametrize("kind", sorted(KINDS))


def config(kind, **more):
    cls, settings = KINDS[kind]
    return getattr(slimtune, cls)(**{**settings, **more})


def made(kind, base="llama", attention=None, **more):
    model = BASES[base]()
    if attention:
        model.set_attn_implementation(attention)
    model = get_peft_model(model, config(kind, **more))
    shake(model)
    return model.eval()


def say(model, ids, **how):
    with torch.no_grad():
        return model(input_ids=ids, **how).logits


def padded(rows, side):
    """Rows as one batch, padded to one length, and its mask."""
    width = max(r.shape[1] for r in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        where = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[at, where], mask[at, where] = row[0], 1
    return ids, mask


ROWS = [tokens(1, n, seed=n) for n in (9, 3, 6)]


# --- a batch is each row alone ------------------------------------------------------------------------------------


@EVERY_SHAPE
@EVERY_KIND
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counted", [True, False])
def test_padded_rows_say_what_each_says_alone(kind, base, attention, side, counted):
    if kind == "adaption" and not counted:
        pytest.skip(
            "its keys are not rotated, so that it hangs on positions, which the base alone counts from the pads"
        )
    model = made(kind, base, attention)
    ids, mask = padded(ROWS, side)
    # What a pad's position is, nobody should read.
    positions = {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)} if counted else {}
    both = say(model, ids, attention_mask=mask, **positions)
    for at, row in enumerate(ROWS):
        assert (both[at][mask[at].bool()] - say(model, row)[0]).abs().max() < CLOSE


@EVERY_SHAPE
@EVERY_KIND
def test_packs_say_what_each_row_says_alone(kind, base, attention):
    model = made(kind, base, attention)
    packs = [ROWS, [tokens(1, n, seed=n) for n in (4, 14)]]
    ids = torch.cat([torch.cat(rows, dim=1) for rows in packs])
    positions = torch.stack([torch.cat([torch.arange(r.shape[1]) for r in rows]) for rows in packs])
    together = say(model, ids, position_ids=positions, use_cache=False)
    for at, rows in enumerate(packs):
        alone = torch.cat([say(model, r) for r in rows], dim=1)
        assert (together[at] - alone[0]).abs().max() < CLOSE


def test_a_pack_traces_on_fake_tensors():
    model = made("prompt")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.func.functional_call(
            model,
            {n: mode.from_tensor(p) for n, p in model.named_parameters()},
            (),
            {
                "input_ids": torch.ones(1, 9, dtype=torch.long),
                "position_ids": torch.arange(9)[None],
                "use_cache": False,
            },
        )
    assert fake.logits.shape == (1, 9, VOCAB)


def mixed(base, attention):
    """A model with two prompts, two prefixes, gated prompts and a LoRA."""
    model = made("prompt", base, attention)
    more = {
        "prompt2": config("prompt", num_virtual_tokens=2),
        "prefix": config("prefix"),
        "prefix2": config("projection"),
        "adaption": config("adaption"),
        "lora": slimtune.LoraConfig(target_modules="all-linear"),
    }
    for seed, (name, one) in enumerate(more.items()):
        model.add_adapter(name, one)
        model.set_adapter(name)
        shake(model, seed=seed)
    return model.eval()


MIXED = ["prefix2", "default", "__base__", "lora", "prefix", "prompt2", "adaption"]


@EVERY_SHAPE
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_rows_say_what_each_says_alone(base, attention, side):
    model = mixed(base, attention)
    rows = [tokens(1, n, seed=n) for n in (9, 3, 6, 8, 2, 7, 5)]
    ids, mask = padded(rows, side)
    both = say(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), adapter_names=MIXED)
    for at, (row, name) in enumerate(zip(rows, MIXED, strict=True)):
        assert (both[at][mask[at].bool()] - alone(model, name, row)[0]).abs().max() < CLOSE, name


def alone(model, name, row):
    if name == "__base__":
        with model.disable_adapter():
            return say(model, row)
    model.set_adapter(name)
    return say(model, row)


@EVERY_SHAPE
def test_packs_of_a_mixed_batch_say_what_each_row_says_alone(base, attention):
    model = mixed(base, attention)
    ids = torch.cat(ROWS, dim=1).expand(len(MIXED), -1)
    positions = torch.cat([torch.arange(r.shape[1]) for r in ROWS]).expand(len(MIXED), -1)
    together = say(model, ids, position_ids=positions, use_cache=False, adapter_names=MIXED)
    for at, name in enumerate(MIXED):
        expected = torch.cat([alone(model, name, row) for row in ROWS], dim=1)
        assert (together[at] - expected[0]).abs().max() < CLOSE, name


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"])
def test_mixed_rows_generate_what_each_does_alone(base):
    model = mixed(base, None)
    ids, mask = tokens(7, 5), torch.ones(7, 5, dtype=torch.long)
    mask[1::2, :2] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=MIXED, num_beams=2, **how)
    for at, name in enumerate(MIXED):
        row, seen = ids[at : at + 1, 2 * (at % 2) :], mask[at : at + 1, 2 * (at % 2) :]
        if name == "__base__":
            with model.disable_adapter():
                one = model.generate(input_ids=row, attention_mask=seen, num_beams=2, **how)
        else:
            model.set_adapter(name)
            one = model.generate(input_ids=row, attention_mask=seen, num_beams=2, **how)
        assert torch.equal(together[at, 5:], one[0, row.shape[1] :]), name


# --- a cache changes nothing --------------------------------------------------------------------------------------


@EVERY_SHAPE
@EVERY_KIND
def test_step_by_step_is_at_once(kind, base, attention):
    model = made(kind, base, attention)
    ids, mask = padded([tokens(1, 12, seed=4), tokens(1, 9, seed=5)], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = say(model, ids, attention_mask=mask, position_ids=positions)
    cache, parts = tf.DynamicCache(config=model.config), []
    for a, b in [(0, 5), (5, 6), (6, 9), (9, 10), (10, 12)]:
        with torch.no_grad():
            out = model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b],
                        past_key_values=cache, use_cache=True)  # fmt: skip
        parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - whole)[mask.bool()].abs().max() < CLOSE


@EVERY_KIND
def test_steps_without_mask_or_positions(kind):
    model = made(kind)
    ids = tokens(2, 9)
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    assert (torch.cat([first.logits, second.logits], dim=1) - say(model, ids)).abs().max() < CLOSE


@EVERY_SHAPE
@EVERY_KIND
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_a_cache_is_without(kind, base, attention, beams):
    model = made(kind, base, attention)
    ids, mask = padded([tokens(1, 6, seed=4), tokens(1, 4, seed=5)], "left")
    how = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
           "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    with_cache, without = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=c, **how) for c in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    assert (torch.stack(with_cache.scores) - torch.stack(without.scores)).abs().max() < CLOSE


@EVERY_KIND
def test_generate_goes_on_from_its_own_cache(kind):
    model = made(kind)
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, more = tokens(1, 5), tokens(1, 4, seed=9)
    first = model.generate(input_ids=ids, **how, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, more], dim=1)
    expected = model.generate(input_ids=whole, **how)
    new = whole[:, first.sequences.shape[1] - 1 :]
    got = model.generate(
        input_ids=new, attention_mask=torch.ones_like(whole), past_key_values=first.past_key_values, **how
    )
    assert torch.equal(got[:, new.shape[1] :], expected[:, whole.shape[1] :])


@EVERY_KIND
def test_guessing_ahead_is_greedy(kind):
    """Prompt lookup gives several tokens at once and takes some back out of the cache."""
    model = made(kind)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tokens(1, 4).repeat(1, 3)
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **how), model.generate(ids, **how))


@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_a_whole_sequence_beside_a_cache_is_refused(kind):
    model = made(kind)
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = model.generate(input_ids=tokens(1, 5), **how, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, tokens(1, 12)], dim=1)
    with pytest.raises(UsageError, match="the new tokens alone"):
        model.generate(input_ids=whole, past_key_values=first.past_key_values, **how)


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix", "projection"])
def test_a_cache_begun_without_the_adapter_is_refused(kind):
    model = made(kind)
    with model.disable_adapter(), torch.no_grad():
        cache = model(input_ids=tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(UsageError, match="without this adapter"):
        model(input_ids=tokens(2, 1), past_key_values=cache)


@EVERY_KIND
@pytest.mark.parametrize("base", ["llama", "gemma2"])
@pytest.mark.parametrize("lengths", [(6, 4), (6, 6)], ids=["padded", "even"])
def test_a_static_cache_works_or_is_refused(kind, base, lengths):
    model = made(kind, base)
    ids, mask = padded([tokens(1, n, seed=n) for n in lengths], "left")
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
           "return_dict_in_generate": True, "attention_mask": mask}  # fmt: skip
    if kind in ("prompt", "p_tuning"):
        with pytest.raises(UsageError, match="fixed length"):
            model.generate(input_ids=ids, cache_implementation="static", **how)
        return
    static, grows = (model.generate(input_ids=ids, cache_implementation=c, **how) for c in ("static", None))
    assert torch.equal(static.sequences, grows.sequences)
    assert (torch.stack(static.logits) - torch.stack(grows.logits)).abs().max() < CLOSE


# --- what stands where --------------------------------------------------------------------------------------------


@EVERY_SHAPE
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_two_are_one_of_both(kind, base, attention):
    """Two active adapters are one whose positions are the first's, then the second's."""
    model = made(kind, base, attention)
    model.add_adapter("second", config(kind, num_virtual_tokens=2))
    model.set_adapter(["default", "second"])
    together = say(model, ROWS[0])
    parts = [
        slimtune.get_peft_model_state_dict(model, adapter_name=n)["prompt_embeddings"] for n in ("default", "second")
    ]
    one = made(kind, base, attention, num_virtual_tokens=7)
    slimtune.set_peft_model_state_dict(one, {"prompt_embeddings": torch.cat(parts)})
    assert (together - say(one, ROWS[0])).abs().max() < CLOSE


@pytest.mark.parametrize("base", ["llama", "gemma2"])
def test_a_prompt_and_a_prefix_at_once(base):
    """The prefix is before the prompt: the same as a prefix alone, over the prompt's embeddings and the tokens'."""
    model = mixed(base, None)
    model.set_adapter(["prefix", "default"])
    together = say(model, ROWS[0])
    model.set_adapter(["default", "prefix"])
    assert (say(model, ROWS[0]) - together).abs().max() < CLOSE
    learned = slimtune.get_peft_model_state_dict(model)["prompt_embeddings"]
    embeds = torch.cat([learned[None], model.get_input_embeddings()(ROWS[0])], dim=1)
    model.set_adapter("prefix")
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits[:, len(learned) :]
    assert (together - expected).abs().max() < CLOSE


@EVERY_KIND
def test_a_lora_beside_is_the_lora_merged_below(kind):
    model = made(kind)
    model.add_adapter("lora", slimtune.LoraConfig(target_modules="all-linear"))
    model.set_adapter("lora")
    shake(model)
    model.set_adapter(["lora", "default"])
    together = say(model, ROWS[0])
    assert (together - say(made(kind), ROWS[0])).abs().max() > 1e-4
    below = get_peft_model(llama(), slimtune.LoraConfig(target_modules="all-linear"))
    slimtune.set_peft_model_state_dict(below, slimtune.get_peft_model_state_dict(model, adapter_name="lora"))
    over = get_peft_model(below.merge_and_unload(), config(kind)).eval()
    slimtune.set_peft_model_state_dict(over, slimtune.get_peft_model_state_dict(model))
    assert (together - say(over, ROWS[0])).abs().max() < CLOSE


@EVERY_KIND
def test_outputs_have_the_sequence_alone(kind):
    model = made(kind)
    ids, mask = padded(ROWS, "left")
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, labels=ids)
        as_tuple = model(input_ids=ids, attention_mask=mask, return_dict=False)
        backbone = model.model(input_ids=ids, attention_mask=mask, return_dict=False)
        last = model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([4, 8])).logits
    assert {s.shape[:2] for s in out.hidden_states} == {ids.shape}
    assert torch.equal(as_tuple[0], out.logits)
    assert torch.equal(backbone[0], out.hidden_states[-1])
    assert (last - out.logits[:, [4, 8]]).abs().max() < CLOSE
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (out.loss - expected).abs() < 1e-5  # transformers takes it in fp32


@EVERY_KIND
def test_a_prepared_mask_is_taken(kind):
    model = made(kind)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = say(model, ROWS[0])
    assert (say(model, ROWS[0], attention_mask=seen[None, None]) - expected).abs().max() < CLOSE
    model.set_attn_implementation("eager")
    added = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    assert (say(model, ROWS[0], attention_mask=added[None, None]) - expected).abs().max() < CLOSE
    # Another mask says something else.
    seen[:, 4] = False
    seen[4, 4] = True
    model.set_attn_implementation("sdpa")
    assert (say(model, ROWS[0], attention_mask=seen[None, None]) - expected)[:, 5:].abs().max() > 1e-6


@EVERY_KIND
@pytest.mark.parametrize("make", [tf.LlamaForSequenceClassification, tf.GPT2ForSequenceClassification])
def test_a_classifier_reads_the_last_token(kind, make, tmp_path):
    sizes = {"vocab_size": VOCAB, "pad_token_id": 0, "num_labels": 3}
    sizes |= DECODER if "Llama" in make.__name__ else {"n_embd": 32, "n_layer": 2, "n_head": 4}
    base = lambda: (torch.manual_seed(0), make(make.config_class(**sizes)).double().eval())[1]  # noqa: E731
    model = get_peft_model(base(), config(kind, task_type="SEQ_CLS")).eval()
    shake(model)
    ids, mask = padded(ROWS, "right")
    both = say(model, ids, attention_mask=mask)
    for at, row in enumerate(ROWS):
        assert (both[at] - say(model, row)[0]).abs().max() < CLOSE
    model.save_pretrained(tmp_path)
    assert torch.equal(say(PeftModel.from_pretrained(base(), tmp_path), ids, attention_mask=mask), both)


@EVERY_KIND
def test_other_models_are_refused_by_name(kind):
    for make in (t5, bert_classifier):
        base = make()
        with pytest.raises(ModelError, match=type(base).__name__):
            get_peft_model(base, config(kind))
        assert not isinstance(base, PeftModel)


@EVERY_KIND
def test_a_bare_backbone_is_a_model(kind):
    base = llama().model
    model = get_peft_model(base, config(kind)).eval()
    shake(model)
    whole = made(kind)
    slimtune.set_peft_model_state_dict(
        model,
        {
            k.replace("model.model.layers", "model.layers"): t
            for k, t in slimtune.get_peft_model_state_dict(whole).items()
        },
    )
    with torch.no_grad():
        assert torch.equal(model(ROWS[0]).last_hidden_state, whole.model(ROWS[0]).last_hidden_state)
    assert type(model.unload()) is tf.LlamaModel


def test_an_attention_that_takes_no_prefix_is_refused():
    model = made("prefix")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="flex_attention"):
        say(model, ROWS[0])


# --- starts from text ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


TEXT = "lexicographer"


def after_text(model, tokenizer, ids):
    text = tf.AutoTokenizer.from_pretrained(tokenizer)(TEXT, return_tensors="pt")["input_ids"]
    text = text.expand(len(ids), -1)
    return say(model, torch.cat([text, ids], dim=1))[:, text.shape[1] :]


@EVERY_SHAPE
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_from_text_the_model_says_what_it_says_after_it(kind, base, attention, tokenizer):
    plain = BASES[base]()
    plain.set_attn_implementation(attention)
    expected = after_text(plain, tokenizer, tokens())
    init = (
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT}
        if kind == "prompt"
        else {"prefix_tuning_init_text": TEXT}
    )
    how = {"num_virtual_tokens": len(TEXT), "tokenizer_name_or_path": tokenizer}
    model = get_peft_model(plain, config(kind, **init, **how)).eval()
    assert (say(model, tokens()) - expected).abs().max() < CLOSE
    assert (say(model, tokens()) - run(BASES[base]())).abs().max() > 1e-4


def test_prefixes_are_set_from_text_and_caches(tokenizer):
    plain = llama()
    expected = after_text(plain, tokenizer, tokens())
    with torch.no_grad():
        words = tf.AutoTokenizer.from_pretrained(tokenizer)
        cache = plain(words(TEXT, return_tensors="pt")["input_ids"], use_cache=True).past_key_values
    model = get_peft_model(plain, config("prefix", num_virtual_tokens=len(TEXT))).train()
    shake(model)
    initialize_kv_prefix_from_text(model, words, text=TEXT, use_chat_template=False)
    assert model.training
    assert (say(model, tokens()) - expected).abs().max() < CLOSE
    shake(model)
    loaded = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(loaded, slimtune.get_peft_model_state_dict(model)["prompt_embeddings"])
    assert (say(model, tokens()) - expected).abs().max() < CLOSE
    with pytest.raises(ConfigError, match="13 tokens"):
        initialize_kv_prefix_from_text(model, words, text=TEXT, use_chat_template=False, num_virtual_tokens=14)
    with pytest.raises(UsageError, match="no prefix"):
        initialize_kv_prefix_from_text(made("projection"), words, text=TEXT)


def test_starts_from_text_and_vocabulary_are_pefts(tokenizer):
    for more in (
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abc", "tokenizer_name_or_path": tokenizer},
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
    ):
        mine, other = (
            start(home, gemma2(), "PromptTuningConfig", num_virtual_tokens=7, **more) for home in (slimtune, peft)
        )
        # peft rounds them to fp32.
        assert torch.equal(mine["prompt_embeddings"].float(), other["prompt_embeddings"])


def start(home, base, cls, seed=1, **settings):
    torch.manual_seed(seed)
    model = home.get_peft_model(base, getattr(home, cls)(task_type="CAUSAL_LM", **settings))
    return home.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("given", "start"),
    [({}, "vocab"), ({"prefix_projection": False}, "vocab"), ({"prefix_projection": True}, None)],
)
def test_recipes_start_a_prefix_near_the_base(given, start):
    assert resolved(given, slimtune.PrefixTuningConfig)["init_weights"] == start


def test_bad_starts_are_refused():
    for settings in (
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
        {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"},
        {"prompt_tuning_init": "WORDS"},
        {"tokenizer_kwargs": {"use_fast": True}},
        {"num_virtual_tokens": 0},
        {"num_transformer_submodules": 2},
    ):
        with pytest.raises(ConfigError):
            config("prompt", **settings)
    for kind, settings in (
        ("prompt", {"token_dim": 16}),
        ("p_tuning", {"token_dim": 16}),
        ("prefix", {"num_layers": 3}),
    ):
        with pytest.raises(ConfigError, match="as the model"):
            made(kind, **settings)
    with pytest.raises(ModelError, match="heads of size"):
        say(made("prefix", token_dim=32), ROWS[0])
    with pytest.raises(ConfigError, match="prefix_projection"):
        config("projection", prefix_tuning_init_text="a", tokenizer_name_or_path="b")
    with pytest.raises(TargetError, match="at most the model's 2 layers"):
        made("adaption", adapter_layers=3)
    with pytest.raises(TargetError, match="did you mean 'self_attn'"):
        made("adaption", target_modules="self_atn")


# --- encoders, and peft -------------------------------------------------------------------------------------------

ENCODERS = {
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"}),
    "projection": ("PrefixTuningConfig", {"encoder_hidden_size": 12, "prefix_projection": True}),
}
EVERY_ENCODER = pytest.mark.parametrize("encoder", sorted(ENCODERS))
PEFT_BASES = pytest.mark.parametrize("base", ["llama", "qwen2", "gpt2", "gemma2"])


def encoded(home, base, encoder):
    cls, settings = ENCODERS[encoder]
    torch.manual_seed(1)
    base = BASES[base]()
    return home.get_peft_model(base, getattr(home, cls)(task_type="CAUSAL_LM", num_virtual_tokens=5, **settings)).eval()


def gradients(model):
    ids = tokens()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    out.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@PEFT_BASES
@EVERY_ENCODER
def test_an_encoder_is_pefts(encoder, base, tmp_path):
    ours, theirs = encoded(slimtune, base, encoder), encoded(peft, base, encoder)
    theirs.prompt_encoder.double()
    mine = [p for p in ours.parameters() if p.requires_grad]
    other = [p for p in theirs.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    ids = tokens()
    there = say(theirs, ids)[:, -ids.shape[1] :]
    assert (say(ours, ids) - there).abs().max() < CLOSE
    assert all((a - b).abs().max() < CLOSE for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(BASES[base](), tmp_path)
    assert (say(loaded, ids) - there).abs().max() < CLOSE
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(BASES[base](), tmp_path).eval()
    assert (say(back, ids)[:, -ids.shape[1] :] - there).abs().max() < 1e-6  # in fp32 there


@EVERY_ENCODER
def test_an_encoder_trains_on_from_our_file(encoder, tmp_path):
    model = encoded(slimtune, "llama", encoder)
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(again), strict=True))


@EVERY_ENCODER
def test_without_the_encoder_it_trains_as_a_table(encoder, tmp_path):
    theirs = encoded(peft, "llama", encoder)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1
    assert trained[0].endswith("prompt_embeddings")
    assert gradients(model)[0].abs().max() > 0
    frozen = PeftModel.from_pretrained(llama(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(AdapterError, match="missing"):
        slimtune.set_peft_model_state_dict(model, {})


def test_dropout_in_an_encoder_leaves_the_file_alone():
    model = encoded(slimtune, "llama", "lstm")
    model.train()
    model.model.adapters["default"].prompt_encoder.lstm_head.dropout = 0.5
    first, second = (slimtune.get_peft_model_state_dict(model)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(first, second)
    assert model.model.adapters["default"].prompt_encoder.training


@pytest.mark.parametrize("base", ["llama", "mistral", "gpt2"])
def test_adaption_prompts_are_pefts(base, tmp_path):
    settings = {"adapter_len": 4, "adapter_layers": 1, "task_type": "CAUSAL_LM"}
    ours, theirs = (home.get_peft_model(BASES[base](), home.AdaptionPromptConfig(**settings)).eval()
                    for home in (slimtune, peft))  # fmt: skip
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "default", is_trainable=True)
    assert (say(ours, tokens()) - run(BASES[base]())).abs().max() > 1e-3
    assert (say(ours, tokens()) - say(theirs, tokens())).abs().max() < CLOSE
    assert all((a - b).abs().max() < CLOSE for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(BASES[base](), tmp_path / "ours").eval()
    assert (say(ours, tokens()) - say(back, tokens())).abs().max() < CLOSE


def test_a_classifier_of_pefts_is_read_and_written(tmp_path):
    make = lambda: (torch.manual_seed(0), tf.LlamaForSequenceClassification(  # noqa: E731
        tf.LlamaConfig(**DECODER, pad_token_id=0, num_labels=3)).eval())[1]  # fmt: skip
    theirs = peft.get_peft_model(make(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = PeftModel.from_pretrained(make(), tmp_path)
    how = {"attention_mask": torch.ones_like(tokens())}
    assert (say(ours, tokens(), **how) - say(theirs, tokens(), **how)).abs().max() < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert (say(ours, tokens(), **how) - say(back, tokens(), **how)).abs().max() < 1e-5
