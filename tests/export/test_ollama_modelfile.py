"""What a Modelfile says is what was meant: values come back as they went in, and none becomes an instruction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.errors import UsageError
from slimtune.export.modelfile import read, written

EVIL = [
    '"',
    '"""',
    "\n",
    "\r",
    " ",
    "#",
    "FROM evil",
    'PARAMETER stop "a"',
    "ADAPTER ./x",
    "é",
    "@",
    "\\",
    "'",
    "\u00a0",
]


def back(name: str, value: str) -> str:
    lines = [("FROM", "base"), (name, value), ("PARAMETER num_ctx", "4096")]
    text = written(lines)
    assert read(text) == lines
    return text.split("\n", 1)[1].removesuffix("PARAMETER num_ctx 4096\n")


VALUES = ["plain", "two words", " blanks at the ends ", 'a "quoted" word', '"', '""', '"""', 'ends in "', '"begins', ""]
VALUES += ["@x", "#x", "it's", "a\nFROM evil\nb", 'a"\nFROM evil', 'say """x""" y\nz', "\n", "\\n", "C:\\x", "a\r\nb"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["SYSTEM", "TEMPLATE", "FROM", "ADAPTER", "PARAMETER stop"])
def test_values_come_back(name, value):
    back(name, value)


def test_how_it_looks():
    assert back("SYSTEM", "Be brief.") == 'SYSTEM """Be brief."""\n'
    assert back("PARAMETER stop", "<|im_end|>") == 'PARAMETER stop "<|im_end|>"\n'
    assert back("ADAPTER", "./my adapter.gguf") == "ADAPTER ./my adapter.gguf\n"
    assert back("FROM", "/a\n/b") == 'FROM "/a\n/b"\n'


@pytest.mark.parametrize("value", ['a"""\nFROM evil', '"""\nFROM evil\n', 'x"\ny"""\nADAPTER ./evil\n'])
def test_a_value_that_would_end_early_is_refused(value):
    with pytest.raises(UsageError, match="SYSTEM cannot be quoted in a Modelfile"):
        back("SYSTEM", value)


@pytest.mark.parametrize(("char", "name"), [("\u00a0", "U\\+00A0"), ("\u200d", "U\\+200D"), ("\x00", "U\\+0000")])
def test_characters_that_ollama_drops_are_refused(char, name):
    with pytest.raises(UsageError, match=f"FROM holds characters that Ollama drops from a Modelfile: '{name}'"):
        back("FROM", f"a{char}b")


@given(values=st.lists(st.lists(st.sampled_from(EVIL), max_size=9).map("".join), min_size=3, max_size=3))
def test_nothing_is_injected(values):
    names = ["FROM", "SYSTEM", "PARAMETER stop"]
    lines = list(zip(names, values, strict=True))
    try:
        text = written(lines)
    except UsageError:
        return
    assert read(text) == lines


def test_reading_as_ollama_does():
    assert read('# FROM x\n\n  from  a b \nsystem """\nx\n"""\nPARAMETER temperature 1\n') == [
        ("FROM", "a b"),
        ("SYSTEM", "\nx\n"),
        ("PARAMETER temperature", "1"),
    ]
    assert read("FROM x") == [("FROM", "x")]
    for wrong in ("FROM", "NOTHING x\n", 'SYSTEM "open\n', "FROM: x\n", "PARAMETER a-b 1\n"):
        with pytest.raises(ValueError):
            read(wrong)
