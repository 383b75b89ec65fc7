"""Answers that a grammar binds match it whole; grammars that cannot bind one are refused, and nothing else is lost."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from hand_run import make_run, save_adapter_of
from serving_client import make_client, send

from slimtune import PrefixTuningConfig
from slimtune.generation import answer_grammar

pytest.importorskip("llguidance")
ASK = [{"role": "user", "content": "Define hope."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
        "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/child"}]},
    },
    "required": ["name", "age", "tags", "child"],
    "additionalProperties": False,
    "$defs": {"child": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": False}},
}
C = 3 + ord("c") - ord("!")
"""The token of this letter in the tests' tokenizer."""
REGEX = r"(\d{4}-\d{2}-\d{2}|none)"


def as_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.fixture(scope="module")
def server(serve, run, base_folder):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prefix = save_adapter_of(base_folder, run.with_name("prefix"), config)
    loha = make_run(run.with_name("pirate"), base_folder, method={"name": "loha"}, size=0.5)
    return serve([run, loha, prefix], max_batch=6)


@pytest.fixture(scope="module")
def client(server):
    return make_client(server)


@pytest.fixture
def ask(client):
    def ask(model="sailor", **settings):
        return client.chat.completions.create(
            model=model, messages=ASK, **{"temperature": 1, "max_tokens": 300, **settings}
        )

    return ask


def require_person(text):
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "top_p": 0.4}], ids=str)
@pytest.mark.parametrize("model", ["sailor", "tiny-base", "prefix"])
def test_an_answer_matches_its_schema(ask, model, settings):
    choice = ask(model, response_format=as_format(PERSON, strict=True), **settings).choices[0]
    assert choice.finish_reason == "stop"
    require_person(choice.message.content)


def test_a_seed_gives_the_same_bound_answer(ask):
    one, two, other = (ask(seed=s, response_format=as_format(PERSON)).choices[0].message.content for s in (3, 3, 5))
    assert one == two != other


@pytest.mark.parametrize(
    ("outputs", "regex"),
    [
        ({"regex": REGEX}, REGEX),
        ({"regex": "^a/b\n$"}, "a/b\n"),
        ({"regex": "[äé日]{3}"}, "[äé日]{3}"),
        ({"choice": ["yes", 'no "é" \\']}, r'yes|no "é" \\'),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 500}}, r"\d{1,3}"),
    ],
    ids=str,
)
def test_structured_outputs_of_vllm(client, outputs, regex):
    for seed in range(3):
        answer = client.completions.create(
            model="sailor", prompt="x", max_tokens=40, seed=seed, extra_body={"structured_outputs": outputs}
        )
        assert re.fullmatch(regex, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"


def test_json_object(ask):
    choice = ask(max_tokens=60, response_format={"type": "json_object"}).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_rows_of_a_batch_have_grammars_of_their_own(server, ask):
    grammars = {"": None, REGEX: {"regex": REGEX}, "yes|no": {"choice": ["yes", "no"]}, r"-?\d+": {"regex": r"-?\d{9}"}}

    def talk(number):
        model = ["sailor", "pirate", "tiny-base"][number % 3]
        regex, outputs = [*grammars.items()][number % 4]
        free = ask(model, temperature=0, max_tokens=12, extra_body={"structured_outputs": outputs} if outputs else {})
        return model, regex, free.choices[0].message.content

    alone = [talk(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(talk, range(12))] == alone
    assert all(re.fullmatch(regex, text) for _, regex, text in alone if regex)


def test_n_answers_to_one_prompt_match(ask):
    texts = [c.message.content for c in ask(n=4, seed=1, response_format=as_format(PERSON)).choices]
    assert len(set(texts)) == 4
    for text in texts:
        require_person(text)


def test_a_stream_equals_the_whole_answer(ask):
    settings = {"seed": 7, "response_format": as_format(PERSON)}
    chunks = [chunk.choices[0] for chunk in ask(stream=True, **settings)]
    assert "".join(c.delta.content or "" for c in chunks) == ask(**settings).choices[0].message.content
    assert chunks[-1].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(ask):
    """They do not know the grammar: what it forces has the probability that the model gives it."""
    free = ask(temperature=0, max_tokens=1, logprobs=True, top_logprobs=3).choices[0].logprobs.content[0]
    outputs = {"structured_outputs": {"choice": ["z"]}}
    bound = ask(temperature=0, logprobs=True, top_logprobs=3, extra_body=outputs).choices[0]
    assert [bound.message.content, len(bound.logprobs.content)] == ["z", 1]
    entry = bound.logprobs.content[0]
    assert entry.logprob < free.logprob
    assert [t.logprob for t in entry.top_logprobs] == pytest.approx([t.logprob for t in free.top_logprobs], abs=1e-5)


def test_a_stop_string_ends_a_bound_answer(ask):
    choice = ask(stop='"age"', response_format=as_format(PERSON)).choices[0]
    assert choice.finish_reason == "stop"
    assert re.fullmatch(r'\{\s*"name"\s*:\s*"[A-Z][a-z]{1,6}"\s*,\s*', choice.message.content)


def test_an_answer_that_is_too_short_says_so(ask):
    choice = ask(max_tokens=5, response_format=as_format(PERSON)).choices[0]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "grammar"}, 'does not support response_format.type "grammar"; it takes only "text", '),
        ({"type": "json_schema"}, 'json_schema belongs to the type "json_schema"'),
        (as_format({"type": "string", "maxLenght": 3}), "unknown keyword 'maxLenght'; did you mean 'maxLength'?"),
        (as_format({"type": "object", "x-guidance": {"lenient": True}}), "unknown keyword 'x-guidance'"),
        (as_format({"not": {"type": "null"}}), "a grammar cannot enforce 'not'"),
        (as_format({"type": "strin"}), "Invalid type: strin"),
        (as_format({"type": "integer", "minimum": 5, "maximum": 3}), "minimum (5) is greater than maximum (3)"),
        (as_format({"$ref": "#"}), "no answer can match the grammar"),
        (as_format({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no answer can match the grammar"),
        (as_format({"$ref": "http://127.0.0.1:9/x.json"}), "refers to another document, which is not fetched"),
        (as_format({"$ref": "file:///etc/passwd"}), "refers to another document, which is not fetched"),
        (as_format({"$ref": "#/$defs/b"}), "Pointer '/$defs/b' does not exist"),
        (as_format({"const": "\ud800"}), "half of a character"),
        (as_format({"enum": ["x" * 1000] * 300}), "at most 200,000"),
        (
            as_format({"oneOf": [{"type": "integer"}, {"type": "number"}]}),
            "oneOf whose schemas have values in common",
        ),
        (as_format({"type": "string", "pattern": "^(?=a)b$"}), "look-around"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused_schemas(server, form, message):
    status, answer = send(
        server, "POST", "/v1/chat/completions", {"model": "sailor", "messages": ASK, "response_format": form}
    )
    assert (status, answer["error"]["param"].partition(".")[0]) == (400, "response_format")
    assert message in answer["error"]["message"]


def nest(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(4000)}


@pytest.mark.parametrize(
    "outputs",
    [
        {"json": nest(110)},
        {"json": {"$ref": "#/$defs/a0", "$defs": CHAIN | {"a4000": {"type": "string"}}}},
        {"json": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}},
        {"json": {"const": nest(200)}},
        {"regex": "((a{1000}){1000}){1000}"},
        {"regex": "(?:a?){5000}a{5000}"},
        {"regex": "(" * 50_000},
        {"regex": "a" * 300_000},
        {"regex": r"(a)\1"},
        {"regex": "["},
        {"regex": r"[^\s\S]"},
        {"regex": "\ud800"},
        {"regex": ""},
        {"choice": []},
        {"choice": ["a"], "regex": "a"},
        {},
        {"grammar": "start: 'a'"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_grammars_are_refused(server, client, outputs):
    body = {"model": "sailor", "prompt": "x", "structured_outputs": outputs}
    status, answer = send(server, "POST", "/v1/completions", body)
    assert (status, answer["error"]["param"].partition(".")[0]) == (400, "structured_outputs")
    assert client.completions.create(model="sailor", prompt="x", max_tokens=2).choices


def test_a_body_of_10_megabytes_is_refused(server):
    body = {"model": "sailor", "prompt": "x", "structured_outputs": {"json": {"enum": ["x" * 10_000_000]}}}
    assert send(server, "POST", "/v1/completions", body)[0] == 413


def test_a_grammar_that_explodes_in_the_answer_ends_that_answer_alone(client, monkeypatch):
    accept = answer_grammar.AnswerMatcher.accept_token

    def explode(matcher, token):
        accept(matcher, token)
        if token == C:
            raise answer_grammar.GrammarError("too complex")

    def talk(regex):
        outputs = {"structured_outputs": {"regex": regex}}
        return client.completions.create(model="sailor", prompt="x", max_tokens=90, extra_body=outputs)

    monkeypatch.setattr(answer_grammar.AnswerMatcher, "accept_token", explode)
    with ThreadPoolExecutor(2) as pool:
        wrong, right = pool.submit(talk, "ababc"), pool.submit(talk, "(ab){20}")
        assert right.result().choices[0].text == "ab" * 20
        with pytest.raises(openai.BadRequestError) as caught:
            wrong.result()
    assert caught.value.code == "invalid_grammar"


def test_two_fields_for_one_answer_are_refused(server):
    form, outputs = {"type": "json_object"}, {"regex": "a"}
    body = {"model": "sailor", "messages": ASK, "response_format": form, "structured_outputs": outputs}
    assert send(server, "POST", "/v1/chat/completions", body)[1]["error"]["param"] == "structured_outputs"


def test_without_the_package_a_grammar_is_refused_and_text_is_not(server, monkeypatch):
    find = answer_grammar.importlib.util.find_spec
    monkeypatch.setattr(
        answer_grammar.importlib.util, "find_spec", lambda name: None if name == "llguidance" else find(name)
    )
    body = {"model": "sailor", "messages": ASK, "max_tokens": 2}
    status, answer = send(server, "POST", "/v1/chat/completions", body | {"response_format": {"type": "json_object"}})
    assert (status, "pip install 'slimtune[serve]'" in answer["error"]["message"]) == (400, True)
    assert send(server, "POST", "/v1/chat/completions", body | {"response_format": {"type": "text"}})[0] == 200
