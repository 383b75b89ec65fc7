"""Answers of llama.cpp: each adapter's own, with its log-probabilities; and what is refused without loading weights."""

import importlib.util
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
import torch
from hand_run import make_run, save_adapter_of
from one_letter_runs import train_to_say
from run_answers import RunAnswers
from serving_client import make_client
from tiny_gguf import write_gguf
from typer.testing import CliRunner
from waiting import wait_until

import slimtune
from slimtune.cli import app
from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError, RunError, UsageError
from slimtune.export import expected_logps as reference
from slimtune.export import gguf as gguf_module
from slimtune.generation import answer_grammar
from slimtune.generation.answer_grammar import CompiledGrammar
from slimtune.serving import llama_cpp_server as llama_cpp
from slimtune.serving.model_server import ModelServer, ServeSettings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
ASK = [{"role": "user", "content": "Define hope."}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 2}},
    "required": ["ok", "tags"],
    "additionalProperties": False,
}
LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """Compare on some of the tokens that users compare on: llama.cpp gives one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MAX_TOKENS": 32, "MAX_POSITIONS": 60, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 4}.items():
            patch.setattr(reference, name, value)
        yield


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    made = tiny_tokenizer()
    made.add_tokens(["Ġa", "Ġ1"])  # what write_gguf's merges make
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tokenizer):
    place = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMTUNE_CACHE", str(place / "cache"))
        yield write_gguf(place / "tiny.gguf", tiny_llama(vocab_size=261, head_dim=8), tokenizer)


@pytest.fixture(scope="module")
def adapters(base, tokenizer):
    """Two adapters that each say one letter, one that says half of a character, and one of random weights."""
    made = []
    for name, letter in {"says-a": "a", "says-b": "b", "half": "Ã"}.items():
        config = slimtune.LoraConfig(r=8, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
        change = train_to_say(tokenizer.convert_tokens_to_ids(letter))
        made.append(save_adapter_of(base, base.with_name(name), config, change))
    config = slimtune.LoraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=LAYERS, task_type="CAUSAL_LM")
    return [*made, save_adapter_of(base, base.with_name("random"), config)]


@pytest.fixture(scope="module")
def server(serve, adapters):
    return serve(adapters, engine="llama.cpp", max_batch=3, max_waiting=32, max_length=256)


@pytest.mark.slow
def test_the_start_proves_every_adapter(server):
    names = ["says-a", "says-b", "half", "random"]
    assert {check.engine: check.passed for check in server.checks} == {f"llama.cpp, {name}": True for name in names}
    assert [m.id for m in make_client(server).models.list()] == ["tiny", *names]


@pytest.mark.slow
def test_log_probabilities_are_the_adapters(server, adapters):
    settings = {"messages": ASK, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    answer = make_client(server).chat.completions.create(model="says-a", **settings)
    generator = RunAnswers(load_run(adapters[0], dtype="float32"))
    ids = generator.ask(ASK, max_new_tokens=12).prompt_ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert len(answer.choices[0].logprobs.content) == 12
    for entry in answer.choices[0].logprobs.content:
        with torch.no_grad():
            expected = generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        assert entry.logprob == pytest.approx(expected.max().item(), abs=0.02)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(expected.topk(2).values.tolist(), abs=0.02)
        ids.append(int(expected.argmax()))


@pytest.mark.slow
def test_many_clients_get_their_own_adapter_and_free_their_slots(server):
    client = make_client(server)

    def talk(number):
        draw = random.Random(number)
        letter, count = draw.choice("ab"), draw.randint(1, 24)
        settings = {"messages": [{"role": "user", "content": "x" * draw.randint(1, 60)}], "max_tokens": count}
        stream = client.chat.completions.create(model=f"says-{letter}", stream=True, temperature=0.5, **settings)
        text = ""
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text and number % 4 == 0:
                stream.close()
                return set(text) == {letter}
        return text == letter * count

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(talk, range(24)))
    wait_until(lambda: server.queue.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})


@pytest.mark.slow
def test_a_stop_string_ends_an_answer_before_it(server):
    client = make_client(server)
    for stop, text, reason in (("aaa", "", "stop"), ("ab", "aaaaa", "length")):
        answer = client.completions.create(model="says-a", prompt="xx", max_tokens=5, temperature=0, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, reason)


@pytest.mark.slow
def test_a_sampled_answer_is_that_of_its_seed(server):
    client = make_client(server)
    settings = {"model": "tiny", "prompt": "xx", "max_tokens": 12, "temperature": 1.5}
    one, two, other = (client.completions.create(seed=s, **settings).choices[0].text for s in (3, 3, 4))
    assert one == two != other


@pytest.mark.slow
@pytest.mark.parametrize("model", ["says-a", "tiny"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_matches_its_grammar(server, model, streams, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    settings = {"model": model, "messages": ASK, "max_tokens": 200, "temperature": temperature, "stream": streams}
    answer = make_client(server).chat.completions.create(**settings, response_format=form)
    choices = [chunk.choices[0] for chunk in answer] if streams else answer.choices
    text = "".join(c.delta.content or "" for c in choices) if streams else choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    assert choices[-1].finish_reason == "stop"
    assert "\n" not in text


@pytest.mark.slow
def test_bound_answers_of_many_clients_match_their_own_grammars(server):
    client = make_client(server)

    def talk(number):
        regex = ["[xy]{5}", r"\d{3}-\d{2}", "(yes|no|é)", ".{2,4}"][number % 4]
        outputs = {"structured_outputs": {"regex": regex}}
        answer = client.completions.create(model="says-b", prompt="x", max_tokens=40, seed=number, extra_body=outputs)
        return re.fullmatch(regex, answer.choices[0].text) and answer.choices[0].finish_reason == "stop"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(talk, range(16)))
    wait_until(lambda: server.queue.count() == {"running": 0, "waiting": 0, "cached_tokens": 0})


@pytest.mark.slow
def test_log_probabilities_of_bound_answers_are_the_models_own(server):
    settings = {"model": "says-a", "prompt": "xx", "temperature": 0, "logprobs": 2}
    free = make_client(server).completions.create(max_tokens=1, **settings).choices[0]
    outputs = {"structured_outputs": {"choice": ["z"]}}
    bound = make_client(server).completions.create(max_tokens=9, extra_body=outputs, **settings).choices[0]
    assert (free.text, bound.text) == ("a", "z")
    assert bound.logprobs.token_logprobs[0] < free.logprobs.token_logprobs[0]
    assert bound.logprobs.top_logprobs[0] == pytest.approx(free.logprobs.top_logprobs[0], abs=0.02)


@pytest.mark.slow
def test_a_grammar_that_llama_cpp_cannot_read_ends_the_answer(server, monkeypatch):
    """It goes on without the grammar; the server notices."""
    compile_it = answer_grammar.GrammarCompiler.compile_for_bytes

    def compile_for_another_engine(compiler, lark):
        return CompiledGrammar("start: NOTHING", compile_it(compiler, lark).matcher)

    monkeypatch.setattr(answer_grammar.GrammarCompiler, "compile_for_bytes", compile_for_another_engine)
    outputs = {"structured_outputs": {"regex": "z{9}"}}
    with pytest.raises(openai.BadRequestError) as caught:
        make_client(server).completions.create(model="says-a", prompt="x", max_tokens=9, extra_body=outputs)
    assert caught.value.code == "invalid_grammar"
    assert make_client(server).completions.create(model="says-a", prompt="x", max_tokens=2).choices


@pytest.mark.slow
def test_log_probabilities_that_llama_cpp_does_not_give_are_an_error(server):
    client = make_client(server)
    with pytest.raises(openai.APIError, match="character"):
        client.completions.create(model="half", prompt="xx", max_tokens=4, temperature=0, logprobs=1)
    assert client.completions.create(model="half", prompt="xx", max_tokens=4).usage.completion_tokens == 4


def test_an_adapter_without_a_gguf_form_is_refused_before_a_weight_is_loaded(base, monkeypatch):
    folder = save_adapter_of(base, base.with_name("ia3"), slimtune.IA3Config(task_type="CAUSAL_LM"))
    monkeypatch.delattr(llama_cpp, "load_runs_for_export")
    with pytest.raises(UsageError, match=r"llama.cpp .*ia3: .*LoRA") as caught:
        ModelServer([str(folder)], ServeSettings(port=0, engine="llama.cpp"))
    assert caught.value.hint.startswith("--engine torch")


@pytest.mark.slow
def test_a_server_that_differs_from_the_adapter_does_not_start(adapters, monkeypatch):
    monkeypatch.setattr(gguf_module, "reorder_rows_for_llama_cpp", lambda rows, *_: rows)
    with pytest.raises((AdapterError, RunError)):  # the file's matrices, or the engine's log-probabilities
        ModelServer([str(adapters[-1])], ServeSettings(port=0, engine="llama.cpp", max_batch=1, max_length=128))


@pytest.mark.slow
def test_a_server_that_was_never_asked_ends(serve, adapters):
    started = serve([adapters[0]], engine="llama.cpp", verify=False, max_batch=1, max_length=128)
    assert started.checks == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "vllm"], "slimtune export RUN --to vllm --out FOLDER"),
        (["--engine", "lama.cpp"], "there is no engine 'lama.cpp'; did you mean 'llama.cpp'?"),
        (["--precision", "f16"], "no effect with --engine torch"),
    ],
)
def test_wrong_flags(flags, message):
    result = CliRunner().invoke(app, ["serve", "RUN", *flags])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_answers_as_generate_says(serve, smollm2_folder, tmp_path):
    run = make_run(tmp_path / "real", smollm2_folder, model={"name": "smollm2-135m", "dtype": "float32"}, size=0.02)
    started = serve([run], engine="llama.cpp", precision="f32", max_batch=2, max_length=256)
    assert [(check.precision, check.passed) for check in started.checks] == [("f32", True)]
    asked = {"model": "real", "messages": ASK, "max_tokens": 16, "temperature": 0}
    answer = make_client(started).chat.completions.create(**asked).choices[0].message.content
    assert answer == RunAnswers.open(run).generate(ASK, max_new_tokens=16)
