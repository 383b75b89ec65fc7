"""The rows that `examples/preferences.py` makes of two dictionaries."""

import runpy
from pathlib import Path

import pytest

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "preferences.py"))
DATA = """  1 This is the licence.
00000012 03 n 01 hope 0 001 @ 00000099 n 0000 | (theology) the wish for a thing; "in hope"; "her last hope"
00000034 03 n 01 hope 1 001 @ 00000099 n 0000 | somebody who is hoped for
"""


@pytest.fixture
def wordnet(tmp_path):
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(DATA if part == "noun" else "")
        (tmp_path / f"index.{part}").write_text(
            "  1 This is the licence.\nhope n 2 1 @ 2 1 00000012 00000034  \n" if part == "noun" else ""
        )
    return tmp_path


def test_first_sense_becomes_a_sentence(wordnet):
    (gloss,) = MAKE["read_glosses"](wordnet).values()
    assert MAKE["make_sentence"](gloss) == "The wish for a thing."


def test_pairs_are_balanced_by_length():
    def row(word, answer):
        ask = {"role": "user", "content": f'Define "{word}".'}
        return {"messages": [ask, {"role": "assistant", "content": answer}]}

    answers = ["Short. But more.", "A longer one here.", "A longer one now.", "Far too long to compare." * 3, "?"]
    rows = [row(f"w{i}", answer) for i, answer in enumerate(answers)]
    pairs = MAKE["make_pairs"](rows, {f"w{i}": "ten letters" for i in range(5)})
    chosen = sorted(pair["chosen"][0]["content"] for pair in pairs)
    assert chosen[1] == "Short."
    assert chosen[0] in answers[1:3]
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["Ten letters."] * 2
