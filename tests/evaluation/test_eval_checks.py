"""Checks of answers, and what cannot be checked."""

import builtins
import json

import pytest

from slimtune.errors import ModelError, UsageError
from slimtune.evaluation.answers import build_checks, measure_repetition


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("exact", " a dull day\n", True),
        ("exact", "a dull days", False),
        ("json", '{"a": [1]}', True),
        ("json", "null", True),
        ("json", 'Sure: {"a": 1}', False),
        ("regex:^a .* day$", "a dull day", True),
        ("regex:^day", "a dull day", False),
    ],
)
def test_check_result(name, answer, found):
    assert build_checks([name])[name](answer, "a dull day") is found


def test_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"type": "object", "required": ["word"], "properties": {"word": {"type": "string"}}}))
    check = build_checks([f"json-schema:{file}"])[f"json-schema:{file}"]
    answers = ('{"word": "a"}', '{"word": 1}', "{}", "word")
    assert [check(a, "") for a in answers] == [True, False, False, False]
    file.write_text('{"type": "objekt"}')
    with pytest.raises(UsageError, match="not a valid JSON schema: 'objekt'"):
        build_checks([f"json-schema:{file}"])
    with pytest.raises(UsageError, match="No such file"):
        build_checks([f"json-schema:{tmp_path / 'none.json'}"])


def test_chrf_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    check = build_checks(["chrf"])["chrf"]
    assert check("a dull day", "a dull day") == pytest.approx(100)
    assert check("a dull dog", "a dull day") == pytest.approx(
        sacrebleu.sentence_chrf("a dull dog", ["a dull day"]).score
    )


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("one two three", 0), ("a b c d e f", 0), ("a b c d a b c d", 1 / 5), ("no " * 100, 96 / 97)],
)
def test_repetition(text, share):
    assert measure_repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exakt", r"no check 'exakt'; did you mean 'exact'"),
        ("regex", r"no check 'regex'; did you mean 'regex:PATTERN'"),
        ("exact:x", "no check"),
        ("regex:(", r"'\(' is not a regular expression"),
    ],
)
def test_bad_check(name, said):
    with pytest.raises(UsageError, match=said):
        build_checks([name])


@pytest.mark.parametrize(("name", "package"), [("chrf", "sacrebleu"), ("json-schema:x", "jsonschema")])
def test_missing_package(monkeypatch, name, package):
    real = builtins.__import__

    def missing(module, *rest):
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match=f"needs the package {package}") as caught:
        build_checks([name])
    assert caught.value.hint == "pip install 'slimtune[eval]'"
