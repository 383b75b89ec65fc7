"""Which tokens a grammar allows: those of a valid answer, and an end token exactly where the answer is complete."""

import json
import random
import re
import subprocess

import jsonschema
import pytest
from gemma_base import join_gemma_gguf

from slimtune.generation import answer_grammar
from slimtune.generation.answer_grammar import (
    GrammarCompiler,
    GrammarError,
    make_choice_grammar,
    make_json_schema_grammar,
    make_regex_grammar,
)

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "tags": {"type": "array", "items": {"enum": [1, "é"]}}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


@pytest.fixture
def compiler():
    return GrammarCompiler()


def list_allowed(matcher, vocab_size):
    return matcher.find_allowed_tokens(vocab_size).tolist()


def test_an_end_token_is_allowed_where_the_answer_is_complete(compiler, tokenizer):
    end, other_end = tokenizer.eos_token_id, tokenizer.bos_token_id
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    grammar = compiler.compile_for_tokens(make_regex_grammar("a{2,3}"), tokenizer, frozenset({end, other_end}), 300)
    matcher, seen = grammar.start_answer(), []
    for _ in range(3):
        seen.append((list_allowed(matcher, 300), matcher.can_end, matcher.must_end))
        matcher.accept_token(a)
    only, both = [a], sorted([end, other_end, a])
    assert seen == [(only, False, False), (only, False, False), (both, True, False)]
    assert (list_allowed(matcher, 300), matcher.must_end) == (sorted([end, other_end]), True)


def test_an_end_token_that_is_text_ends_no_answer_before_it_is_complete(compiler, tokenizer):
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    grammar = compiler.compile_for_tokens(make_regex_grammar("aba"), tokenizer, frozenset({b}), 259)
    matcher = grammar.start_answer()
    matcher.accept_token(a)
    assert (list_allowed(matcher, 259), matcher.can_end) == ([b], False)
    matcher.accept_token(b)
    matcher.accept_token(a)
    assert matcher.must_end


def test_a_model_without_an_end_token_ends_where_nothing_can_follow(compiler, tiny_tokenizer):
    tokenizer = tiny_tokenizer(eos_token=None)
    grammar = compiler.compile_for_tokens(make_choice_grammar(["a"]), tokenizer, frozenset(), 259)
    matcher = grammar.start_answer()
    matcher.accept_token(list_allowed(matcher, 259)[0])
    assert matcher.must_end


def test_answers_to_one_grammar_do_not_meet(compiler, tokenizer):
    grammar = compiler.compile_for_tokens(make_regex_grammar("[ab]c"), tokenizer, frozenset({2}), 259)
    one, other = grammar.start_answer(), grammar.start_answer()
    before = list_allowed(other, 259)
    one.accept_token(before[0])
    assert (list_allowed(other, 259), len(before)) == (before, 2)


def test_compiled_grammars_and_errors_are_remembered_and_few(compiler, tokenizer, tiny_tokenizer, monkeypatch):
    checked = []
    check = answer_grammar._check_in_process
    monkeypatch.setattr(answer_grammar, "_check_in_process", lambda lark: (checked.append(lark), check(lark)))
    monkeypatch.setattr(answer_grammar, "MAX_CACHED", 2)
    for pattern in ("a", "(", "a", "(", "b", "a"):
        for each in (tokenizer, tiny_tokenizer()):  # runs whose tokenizers are equal
            try:
                compiler.compile_for_tokens(make_regex_grammar(pattern), each, frozenset({2}), 259)
            except GrammarError:
                assert pattern == "("
    assert checked == [make_regex_grammar(pattern) for pattern in ("a", "(", "b", "a")]


def test_a_check_that_takes_too_long_is_an_error_that_is_not_remembered(compiler, monkeypatch):
    monkeypatch.setattr(answer_grammar, "CHECK_SECONDS", 0.0)
    with pytest.raises(GrammarError) as caught:
        compiler.compile_for_bytes(make_regex_grammar("a"))
    assert isinstance(caught.value.__cause__, subprocess.TimeoutExpired)
    monkeypatch.undo()
    assert compiler.compile_for_bytes(make_regex_grammar("a"))


def test_a_tokenizer_that_changes_the_text_is_refused(compiler, tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    sound = compiler.compile_for_tokens(make_regex_grammar("a"), tokenizer, frozenset({2}), 259)
    tokenizer.decode = lambda ids, **_: "".join(map(chr, ids))
    with pytest.raises(GrammarError, match="tokenizer"):
        GrammarCompiler().compile_for_tokens(make_regex_grammar("a"), tokenizer, frozenset({2}), 259)
    assert sound.lark


def test_json_on_one_line_is_json_without_other_spaces(compiler):
    for on_one_line, texts in ((True, ['{"name": "a"}']), (False, ['{"name": "a"}', '{\n    "name":"a"\n}'])):
        matches = []
        for text in ('{"name": "a"}', '{\n    "name":"a"\n}', '{"name":      "a"}'):
            lark = make_json_schema_grammar(SCHEMA, on_one_line=on_one_line)
            try:
                compiler.compile_for_bytes(lark).start_answer().accept_text(text)
            except GrammarError:
                continue
            matches.append(text)
        assert matches == texts


def test_generate_binds_the_answers_of_both_models(slimtune, shared_run, tmp_path):
    (file := tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    ask = ["generate", shared_run, "hi", "--json", "--side-by-side", "--max-new-tokens", 300, "--temperature", 1]
    bound, matched = (
        json.loads(slimtune(*ask, *flag).stdout) for flag in (["--json-schema", file], ["--regex", r"(ab|\d){3}"])
    )
    for name in ("base", "tuned"):
        jsonschema.validate(json.loads(bound[name]), SCHEMA)
        assert re.fullmatch(r"(ab|\d){3}", matched[name])


def test_generate_says_that_a_bound_answer_is_cut_off(slimtune, shared_run):
    done = slimtune("generate", shared_run, "hi", "--regex", "a{9}", "--max-new-tokens", 3)
    assert (done.exit_code, done.stdout, "--max-new-tokens" in done.stderr) == (0, "aaa\n", True)


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("{}", ["--regex", "a"]),
        ("[1]", []),
        ("{", []),
        ('{"type": "strin"}', []),
        ('{"foo": 1}', []),
        (None, []),
    ],
)
def test_generate_refuses_a_wrong_grammar(slimtune, shared_run, tmp_path, content, flags):
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    assert slimtune("generate", shared_run, "hi", "--json-schema", file, *flags).exit_code == 2


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_any_allowed_tokens_of_real_tokenizers_are_valid_text(compiler, name, request):
    from transformers import AutoTokenizer

    from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

    if name == "gemma":
        folder = get_or_make_hf_folder_and_seconds(join_gemma_gguf())[0]
    else:
        folder = request.getfixturevalue("smollm2_folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size, ends = len(tokenizer) + 3, frozenset({tokenizer.eos_token_id})
    lark = make_json_schema_grammar(SCHEMA)
    expression = r"[A-Z]\p{Ll}{2,9}( \d{1,3}){2}"
    bound = compiler.compile_for_tokens(lark, tokenizer, ends, size)
    matched = compiler.compile_for_tokens(make_regex_grammar(expression), tokenizer, ends, size)
    for seed in range(20):
        for grammar in (bound, matched):
            matcher, ids, rng = grammar.start_answer(), [], random.Random(seed)
            while not matcher.must_end:
                token = rng.choice(list_allowed(matcher, size))
                if token in ends:
                    break
                matcher.accept_token(token)
                ids.append(token)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if grammar is matched:
                assert re.fullmatch(r"[A-Z][^\W\d_A-Z]{2,9}( [0-9]{1,3}){2}", text)
            else:
                jsonschema.validate(json.loads(text), SCHEMA)
