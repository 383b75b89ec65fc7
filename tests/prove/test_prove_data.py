"""The data report against a corpus: it finds every fault at its lines, and nothing in sound files."""

from pathlib import Path

import pytest
from faulty_files import write_faulty_files
from sound_files import write_sound_files

from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.loader import load_tokenizer
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.evaluation.data_report.row_checks import FINDING_TYPES

pytestmark = pytest.mark.real
TEMPLATES = Path(__file__).parents[1] / "core/data/templates"
SELECTIONS = [pytest.param(slice(1, None, 8), id="some"), pytest.param(slice(None), id="all", marks=pytest.mark.prove)]

OF_ALL_PAIRS = ("preference", "length-leak")
"""Issues that the pairs of these files have on purpose: their better answers are the longer ones."""


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return load_tokenizer(str(smollm2_folder))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_faulty_files(tmp_path_factory.mktemp("faulty"))


@pytest.fixture(scope="module")
def sound_paths(tmp_path_factory):
    return list(write_sound_files(tmp_path_factory.mktemp("sound")))


def test_corpus(cases, sound_paths):
    assert len(cases) == len({case.path for case in cases}) >= 179
    assert len(sound_paths) == len(set(sound_paths)) >= 45
    elsewhere = {"doubled-bos", "missing-end", "unused-column", "validation-invalid"}  # tests/data/test_validation.py
    elsewhere |= {"other-prompt", "short-document"}  # tests/data/test_thinking.py, test_documents.py
    elsewhere |= {"length-leak", "contradictory-pair"}  # tests/data/test_answer_rows.py
    elsewhere |= {"repeated-prompt", "prompt-in-answer", "prompt-in-completion"}  # tests/extras/test_pair_prompts.py
    elsewhere |= {"different-turns", "no-prompt"}  # tests/extras/test_pair_prompts.py
    elsewhere |= {"special-token-as-text", "special-token-in-document"}  # tests/extras/test_documents.py
    elsewhere |= {"swapped-texts"}  # tests/evaluation/test_swapped_texts.py
    elsewhere |= {"swapped-roles", "unbalanced-thinking"}  # tests/evaluation/test_data_report.py, test_thinking.py
    elsewhere |= {"empty-answer"}  # a guard: no row is known that gets there
    labels = {code for code in FINDING_TYPES if "label" in code or "class" in code}  # tests/data/test_label_rows.py
    assert set(FINDING_TYPES) - {case.code for case in cases} == elsewhere | labels


@pytest.mark.parametrize("selection", SELECTIONS)
def test_faults_are_found_at_their_lines(cases, tokenizer, selection):
    wrong = {}
    for case in cases[selection]:
        report = to_json_dict(make_data_report(case.path, tokenizer, model="smollm2-135m", processes=1, **case.options))
        found = {issue["code"]: issue["lines"] for issue in report["issues"]}
        found = {code: lines for code, lines in found.items() if code not in OF_ALL_PAIRS}
        expected = {case.code: case.lines} | {code: found.get(code) for code in case.also}
        if found != expected or report["verdict"] == "ok":
            wrong[case.path.name] = (expected, found)
    assert wrong == {}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_is_found_in_sound_files(sound_paths, tokenizer, selection, monkeypatch):
    wrong = {}
    for path in sound_paths[selection]:
        with monkeypatch.context() as patch:
            if path.name == "tools.jsonl":  # SmolLM2's own template leaves tools out
                patch.setattr(tokenizer, "chat_template", (TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8"))
            report = to_json_dict(
                make_data_report(path, tokenizer, model="smollm2-135m", max_seq_len=4096, processes=1)
            )
        assert 0 < report["supervised_tokens"] < report["tokens"]
        issues = [issue for issue in report["issues"] if issue["code"] not in OF_ALL_PAIRS]
        if issues or report["invalid_rows"]:
            wrong[path.name] = issues
    assert wrong == {}
