"""Answers: the tokens of plain greedy generation, streamed; base and tuned; ends, seeds and errors."""

import types
import warnings

import pytest
import torch
from hand_run import make_run
from run_answers import RunAnswers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from slimtune.core.adapters.peft_model import PeftModel
from slimtune.errors import AdapterError, ModelError, UsageError
from slimtune.generation.generation_models import find_end_token_ids, tokenize_chat_prompt

ASK = [{"role": "user", "content": "Define hope."}]


@pytest.fixture
def generator(run):
    return RunAnswers.open(run)


def end_after_two_letters(generator):
    """Let the model say two letters and end the turn; return the list that grows with each forward pass."""
    passes = []

    def change(module, args, kwargs, out):
        passes.append(1)
        out.logits[..., 65 if len(passes) < 3 else 2] = 1e4

    generator.model.register_forward_hook(change, with_kwargs=True)
    return passes


@torch.no_grad()
def generate_without_cache(model, tokenizer, count):
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + count and ids[0, -1] != 2:
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_greedy_equals_no_cache(run, generator, tiny_folder):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    base = generate_without_cache(model, tokenizer, 24)
    tuned = generate_without_cache(PeftModel.from_pretrained(model, run / "adapter"), tokenizer, 24)
    assert base != tuned
    answers = [generator.generate(ASK, max_new_tokens=24, tuned=t) for t in (True, False, True)]
    assert answers == [tuned, base, tuned]


def test_pieces_are_streamed(generator):
    pieces = [piece for _, piece in generator.stream(ASK, max_new_tokens=60)]
    assert len(pieces) == 60
    assert "".join(piece.text for piece in pieces) == generator.generate(ASK, max_new_tokens=60)


def test_seed(generator):
    before = torch.get_rng_state()
    one, again, other = (generator.generate(ASK, temperature=1.5, seed=s, max_new_tokens=30) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_config_is_not_used(run, tmp_path, tiny_folder, caplog):
    expected = RunAnswers.open(run).generate(ASK, max_new_tokens=20)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=9.0)
    model.save_pretrained(tiny_folder)
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generator = RunAnswers.open(make_run(tmp_path / "other", tiny_folder))
            assert generator.generate(ASK, max_new_tokens=20) == expected
            generator.generate(ASK, max_new_tokens=20, temperature=0.7)
    finally:
        transformers_logging.disable_propagation()
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_answer_ends_at_the_end_of_turn_of_the_template(tmp_path, tiny_folder, tiny_tokenizer):
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tiny_folder)
    generator = RunAnswers.open(make_run(tmp_path / "run", tiny_folder))
    assert generator.models["tuned"].end_tokens == {0, 1, 2}
    passes = end_after_two_letters(generator)
    assert len(generator.generate(ASK, max_new_tokens=50)) == 2
    assert len(passes) == 3


def test_answer_reports_whether_it_ended(generator):
    passes = end_after_two_letters(generator)
    ended = generator.answer(ASK, max_new_tokens=9)
    passes.clear()
    assert (ended.num_tokens, ended.finish_reason, len(ended.text)) == (3, "stop", 2)
    again = generator.answer(ASK, max_new_tokens=2)
    assert (again.num_tokens, again.finish_reason) == (2, "length")


def test_several_end_tokens(tiny_tokenizer):
    config = types.SimpleNamespace(eos_token_id=[7, 9])
    assert find_end_token_ids(config, tiny_tokenizer()) == (2, 7, 9)
    assert find_end_token_ids(config, tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")) == (2, 7, 9)


def test_closing_the_stream_stops_generation(generator):
    expected = generator.generate(ASK, max_new_tokens=10)
    passes = []
    hook = generator.model.register_forward_hook(lambda *_: passes.append(1))
    pieces = generator.stream(ASK, tuned=False, max_new_tokens=300)
    next(pieces)
    pieces.close()
    hook.remove()
    assert len(passes) == 2  # the prompt, and one token
    assert generator.generator.count() == {"running": 0, "waiting": 0, "cached_tokens": 0}
    assert generator.generate(ASK, max_new_tokens=10) == expected


def test_two_streams_at_once(generator):
    tuned, base = (generator.generate(ASK, tuned=t, max_new_tokens=30) for t in (True, False))
    one, other = (generator.stream(ASK, tuned=t, max_new_tokens=30) for t in (True, False))
    first, second = [next(one)], [next(other)]
    texts = ["".join(piece.text for _, piece in pieces) for pieces in (first + list(one), second + list(other))]
    assert texts == [tuned, base]


def test_exception_while_generating(generator):
    def fail(*_):
        raise MemoryError("no room for the cache")

    hook = generator.model.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="cache"):
        generator.generate(ASK, tuned=False)
    hook.remove()
    assert generator.generate(ASK, max_new_tokens=5)


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([{"role": "user", "content": " \n"}], {}, "the prompt is empty"),
        (ASK, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (ASK, {"temperature": -1.0}, "temperature is -1.0"),
        (ASK, {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_bad_input(generator, messages, settings, message):
    with pytest.raises(UsageError, match=message):
        generator.stream(messages, **settings)


def test_prompt_without_room(generator):
    with pytest.raises(UsageError, match=r"\b128\b.*\b512\b") as caught:
        generator.stream([{"role": "user", "content": "x" * 600}])
    assert caught.value.hint
    with pytest.raises(UsageError) as caught:
        generator.stream(ASK, max_new_tokens=500)
    prompt = 512 - int(caught.value.hint.removeprefix("--max-new-tokens "))
    assert f" {prompt} tokens" in caught.value.message


@pytest.mark.parametrize("token", ["x", [2, "x"], 2.5, {"a": 1}])
def test_end_token_that_is_no_id_is_named(tiny_tokenizer, token):
    with pytest.raises(ModelError, match="eos_token_id"):
        find_end_token_ids(types.SimpleNamespace(eos_token_id=token), tiny_tokenizer())


def test_template_that_writes_nothing(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(UsageError, match="nothing"):
        tokenize_chat_prompt(tokenizer, [{"role": "user", "content": "Hi"}])


def test_template_rejects_the_messages(tmp_path, tiny_folder, tiny_tokenizer):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = refuses + tokenizer.chat_template
    tokenizer.save_pretrained(tiny_folder)
    generator = RunAnswers.open(make_run(tmp_path / "run", tiny_folder))
    with pytest.raises(UsageError, match=r"\(system, user\)") as caught:
        generator.stream([{"role": "system", "content": "Be brief."}, *ASK])
    assert "system" in caught.value.hint


def test_base_without_a_chat_template_answers_with_a_built_in_one(tmp_path, tiny_folder, tiny_tokenizer):
    (tiny_folder / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(chat_template=None).save_pretrained(tiny_folder)
    answers = RunAnswers.open(make_run(tmp_path / "run", tiny_folder))
    assert list(answers.stream(ASK)) is not None


@pytest.mark.parametrize("spoiled", ["adapter", "base"])
def test_nan_is_an_error(tmp_path, tiny_folder, spoiled):
    generator = RunAnswers.open(make_run(tmp_path / "run", tiny_folder))
    named = generator.model.named_parameters()
    next(p for name, p in named if ("lora_" in name) == (spoiled == "adapter")).data.fill_(float("nan"))
    with pytest.raises(AdapterError if spoiled == "adapter" else ModelError, match="NaN"):
        generator.generate(ASK, tuned=spoiled == "adapter")
