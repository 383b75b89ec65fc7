"""The survey against a corpus: every fault in a file is found at its lines, and nothing is found in sound files."""

from pathlib import Path

import pytest
from faulty_files import faulty
from sound_files import sound

from slimtune.data.validation.report import ISSUE_TYPES, validate_file
from slimtune.models.loader import load_tokenizer

pytestmark = pytest.mark.real
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
PART = slice(1, None, 8)
"""The files that the ordinary suite looks at; `make prove` looks at all."""


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return load_tokenizer(str(smollm2_folder))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return faulty(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return list(sound(tmp_path_factory.mktemp("ok")))


def missed(cases, tokenizer):
    """Of each file in which something else was found than there is: what is there, and what was found."""
    wrong = {}
    for case in cases:
        report = validate_file(case.path, tokenizer, model="smollm2-135m", processes=1, **case.options)
        found = {f["code"]: f["lines"] for f in report["issues"]}
        wanted = {case.code: case.lines} | {code: found.get(code) for code in case.also}
        if found != wanted or report["verdict"] == "ok":
            wrong[case.name] = (wanted, found)
    return wrong


def alarms(paths, tokenizer):
    """What was found in each sound file."""
    found = {}
    for path in paths:
        own = tokenizer.chat_template
        if path.name == "tools.jsonl":  # SmolLM2's own template leaves tools out
            tokenizer.chat_template = (TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
        report = validate_file(path, tokenizer, model="smollm2-135m", max_seq_len=4096, processes=1)
        tokenizer.chat_template = own
        assert 0 < report["supervised_tokens"] < report["tokens"]
        if report["verdict"] != "ok" or report["issues"] or report["invalid_rows"]:
            found[path.name] = report["issues"]
    return found


def test_the_corpus_is_what_it_has_to_be(cases, paths):
    assert len(cases) == len({c.path for c in cases}) >= 60
    assert len(paths) == len(set(paths)) >= 20
    about_the_template = {"doubled-bos", "missing-end"}  # tests/data/test_validation.py
    assert set(ISSUE_TYPES) - {c.code for c in cases} == about_the_template | {"validation-invalid"}


def test_faults_are_found_at_their_lines(cases, tokenizer):
    assert missed(cases[PART], tokenizer) == {}


def test_nothing_is_found_in_sound_files(paths, tokenizer):
    assert alarms(paths[PART], tokenizer) == {}


@pytest.mark.prove
def test_every_fault_is_found_at_its_lines(cases, tokenizer):
    assert missed(cases, tokenizer) == {}


@pytest.mark.prove
def test_nothing_is_found_in_any_sound_file(paths, tokenizer):
    assert alarms(paths, tokenizer) == {}
