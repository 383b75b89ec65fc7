"""Answers: the tokens of plain greedy generation, streamed; base and tuned; ends, seeds, faults and refusals."""

import threading
import time
import warnings

import pytest
import torch
from hand_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as theirs

from slimtune.adapters.model import PeftModel
from slimtune.errors import ModelError, UsageError
from slimtune.evaluation.generate import Generator, find_end_tokens

ASK = [{"role": "user", "content": "Define hope."}]


@pytest.fixture
def run(tmp_path, tiny_folder):
    return make_run(tmp_path / "run", tiny_folder)


def plain(model, tokenizer, tokens: int) -> str:
    """Greedy without cache, by hand."""
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 2:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_base_and_tuned_say_what_greedy_without_a_cache_says(run, tiny_folder):
    generator = Generator.open(run)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    base = plain(model, tokenizer, 24)
    tuned = plain(PeftModel.from_pretrained(model, run / "adapter"), tokenizer, 24)
    assert base != tuned
    assert generator.generate(ASK, max_new_tokens=24) == tuned
    assert generator.generate(ASK, max_new_tokens=24, tuned=False) == base
    assert generator.generate(ASK, max_new_tokens=24) == tuned


def test_pieces_are_streamed(run):
    generator = Generator.open(run)
    pieces = list(generator.stream(ASK, max_new_tokens=60))
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == generator.generate(ASK, max_new_tokens=60)


def test_seed_repeats_an_answer(run):
    generator = Generator.open(run)
    before = torch.get_rng_state()
    one = generator.generate(ASK, temperature=1.5, seed=1, max_new_tokens=30)
    assert generator.generate(ASK, temperature=1.5, seed=1, max_new_tokens=30) == one
    assert generator.generate(ASK, temperature=1.5, seed=2, max_new_tokens=30) != one
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_config_is_not_inherited(tmp_path, tiny_folder, caplog):
    wanted = Generator.open(make_run(tmp_path / "plain", tiny_folder)).generate(ASK, max_new_tokens=20)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5, top_k=3, repetition_penalty=9.0)
    model.save_pretrained(tiny_folder)
    theirs.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generator = Generator.open(make_run(tmp_path / "run", tiny_folder))
            said = generator.generate(ASK, max_new_tokens=20)
            generator.generate(ASK, max_new_tokens=20, temperature=0.7)
    finally:
        theirs.disable_propagation()
    assert said == wanted
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_answer_ends_at_the_end_of_turn_of_the_template(tmp_path, tiny_folder, tiny_tokenizer):
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(tiny_folder)
    generator = Generator.open(make_run(tmp_path / "run", tiny_folder))
    assert generator.end_tokens == (0, 1, 2)
    steps = []

    def say_the_end(module, args, kwargs, out):
        steps.append(1)
        out.logits[..., 65 if len(steps) < 3 else 2] = 1e4

    generator.model.register_forward_hook(say_the_end, with_kwargs=True)
    assert len(generator.generate(ASK, max_new_tokens=50)) == 2
    assert len(steps) == 3


def test_find_end_tokens_a_checkpoint_that_names_several(tiny_tokenizer):
    class Settings:
        eos_token_id = [7, 9]

    assert find_end_tokens(Settings, tiny_tokenizer()) == (2, 7, 9)
    assert find_end_tokens(Settings, tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")) == (2, 7, 9)


def test_closing_the_stream_stops_generation(run):
    generator = Generator.open(run)
    wanted = generator.generate(ASK, max_new_tokens=10)
    steps, letter = [], generator.tokenizer.convert_tokens_to_ids("a")

    def say_a_letter_slowly(module, args, out):
        steps.append(1)
        time.sleep(0.01)
        out.logits[..., letter] = 1e4

    hook = generator.model.register_forward_hook(say_a_letter_slowly)
    pieces = generator.stream(ASK, tuned=False, max_new_tokens=300)
    next(pieces)
    pieces.close()
    hook.remove()
    assert len(steps) < 100
    assert "slimtune-answer" not in [t.name for t in threading.enumerate()]
    assert generator.generate(ASK, max_new_tokens=10) == wanted


def test_two_answers_at_once_do_not_disturb_each_other(run):
    generator = Generator.open(run)
    tuned, base = (generator.generate(ASK, tuned=t, max_new_tokens=30) for t in (True, False))
    one, other = (generator.stream(ASK, tuned=t, max_new_tokens=30) for t in (True, False))
    first, second = [next(one)], [next(other)]
    assert ("".join(first + list(one)), "".join(second + list(other))) == (tuned, base)


def test_a_fault_while_generating_reaches_the_caller(run):
    generator = Generator.open(run)

    def broken(*_):
        raise MemoryError("no room for the cache")

    hook = generator.model.register_forward_pre_hook(broken)
    with pytest.raises(MemoryError, match="no room for the cache"):
        generator.generate(ASK, tuned=False)
    hook.remove()
    assert generator.generate(ASK, max_new_tokens=5)


@pytest.mark.parametrize(
    ("messages", "settings", "said"),
    [
        ([], {}, "the prompt is empty"),
        ([{"role": "user", "content": " \n"}], {}, "the prompt is empty"),
        (ASK, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (ASK, {"temperature": -1.0}, "temperature is -1.0"),
        (ASK, {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_bad_prompts(run, messages, settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        Generator.open(run).stream(messages, **settings)
    assert caught.value.exit_code == 2


def test_prompt_without_room(run):
    generator = Generator.open(run)
    with pytest.raises(UsageError) as caught:
        generator.stream([{"role": "user", "content": "x" * 600}])
    assert "the answer may have 128, the model's context holds 512" in caught.value.message
    assert "a shorter prompt" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        generator.stream(ASK, max_new_tokens=500)
    prompt = 512 - int(caught.value.hint.removeprefix("--max-new-tokens "))
    assert f"the prompt has {prompt} tokens" in caught.value.message


def test_a_template_that_refuses_the_messages_is_quoted(tmp_path, tiny_folder, tiny_tokenizer):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = refuses + tokenizer.chat_template
    tokenizer.save_pretrained(tiny_folder)
    generator = Generator.open(make_run(tmp_path / "run", tiny_folder))
    with pytest.raises(UsageError, match="System role not supported") as caught:
        generator.stream([{"role": "system", "content": "Be brief."}, *ASK])
    assert "system, user" in caught.value.message
    assert caught.value.hint == "leave the system message out"


def test_a_base_without_a_template_says_how_to_give_one(tmp_path, tiny_folder, tiny_tokenizer):
    (tiny_folder / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(chat_template=None).save_pretrained(tiny_folder)
    with pytest.raises(ModelError, match="no chat template") as caught:
        Generator.open(make_run(tmp_path / "run", tiny_folder))
    assert "data.chat_template" in caught.value.hint
    assert caught.value.exit_code == 1
