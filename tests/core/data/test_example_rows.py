"""The examples' rows: those of the Devil's Dictionary (counts, clean text, one split per headword) and its script on a
piece of the source; the pairs that `examples/preferences.py` makes of that dictionary and WordNet."""

import gzip
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.extras.row_files import read_rows

FOLDER = Path(__file__).parents[3] / "examples" / "devils-dictionary"
SPLITS = {split: read_rows(FOLDER / f"{split}.jsonl") for split in ("train", "validation", "test")}
SOURCE = """00-database-short
     The Devil's Dictionary

ABASEMENT, n.  A decent and customary mental attitude in the presence
of wealth of power.

ABRACADABRA.

    By _Abracadabra_ we signify
        An infinite number of things.
                                                       Jamrach Holobom

ABRUPT, adj.  Sudden, like the arrival of a cannon-
shot.  Said of another
author.
    Among the _ancients_ it was known, as the
poet says:

    Spring beckons!
    The trees are leaving.
                                                                  G.J.

and so it goes on.

ACADEMY, n.  [from {ACADEME}]   A modern school where football is
taught.  (See FOOTBALL.)

ALLAH, n.  The Mahometan Supreme Being.

 abcdefghijklmnopqrstuvwxyz
"""


def make(*args):
    return subprocess.run([sys.executable, FOLDER / "make.py", *args], capture_output=True, text=True, check=False)


def test_headwords_are_in_one_split_only():
    assert {split: len(rows) for split, rows in SPLITS.items()} == {"train": 779, "validation": 96, "test": 93}
    questions = {split: {row.messages[0]["content"] for row in rows} for split, rows in SPLITS.items()}
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert not questions["validation"] & questions["test"]
    words = {re.fullmatch(r'Define "(.+)"\.', question)[1] for some in questions.values() for question in some}
    assert {"un-American", "I", "King's evil"} < words


def test_answers_are_one_clean_paragraph():
    answers = [row.messages[1]["content"] for rows in SPLITS.values() for row in rows]
    for answer in answers:
        assert answer == " ".join(answer.split()), "verse keeps its lines and indentation"
        assert not re.search(r"[\[\]{}_]|\bG\.J\.|\(See ", answer), answer
        assert answer[0].isupper() or answer[0] in '("', answer
        assert answer.endswith((".", "!", "?", '"', ")")), answer
        assert len(answer) <= 950
    assert len(answers) == len(set(answers))


def test_public_domain_notice():
    notice = (FOLDER / "NOTICE").read_text()
    assert "A Public Domain Text, Copyright Expired" in notice
    assert "AMBROSE BIERCE" in notice


def test_script_on_a_piece_of_the_source(tmp_path):
    source = tmp_path / "devil.dict.dz"
    source.write_bytes(gzip.compress(SOURCE.encode()))
    done = make("--dict", source, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    made = {split: (tmp_path / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    rows = {split: [[m["content"] for m in json.loads(line)["messages"]] for line in made[split]] for split in SPLITS}
    assert sorted(row for some in rows.values() for row in some) == [
        ['Define "Allah".', "The Mahometan Supreme Being."],
        ['Define "abasement".', "A decent and customary mental attitude in the presence of wealth of power."],
        ['Define "abrupt".', "Sudden, like the arrival of a cannon-shot. Said of another author."],
        ['Define "academy".', "A modern school where football is taught."],
    ]
    for split, some in rows.items():  # only the hash of a word decides about its file
        assert {question for question, _ in some} <= {row.messages[0]["content"] for row in SPLITS[split]}


def test_missing_dictionary(tmp_path):
    done = make("--dict", tmp_path / "none.dz", "--out", tmp_path)
    assert done.returncode == 2
    assert "apt-get install dict-devil" in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.skipif(not Path("/usr/share/dictd/devil.dict.dz").is_file(), reason="dict-devil is not installed")
def test_files_are_what_the_script_makes(tmp_path):
    assert make("--out", tmp_path).returncode == 0
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


# --- preference pairs


WORDNET = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "preferences.py"))
WORDNET_DATA = """  1 This is the licence.
00000012 03 n 01 hope 0 001 @ 00000099 n 0000 | (theology) the wish for a thing; "in hope"; "her last hope"
00000034 03 n 01 hope 1 001 @ 00000099 n 0000 | somebody who is hoped for
"""


@pytest.fixture
def wordnet(tmp_path):
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text(WORDNET_DATA if part == "noun" else "")
        (tmp_path / f"index.{part}").write_text(
            "  1 This is the licence.\nhope n 2 1 @ 2 1 00000012 00000034  \n" if part == "noun" else ""
        )
    return tmp_path


def test_first_sense_becomes_a_sentence(wordnet):
    (gloss,) = WORDNET["read_glosses"](wordnet).values()
    assert WORDNET["make_sentence"](gloss) == "The wish for a thing."


def test_pairs_are_balanced_by_length():
    def row(word, answer):
        ask = {"role": "user", "content": f'Define "{word}".'}
        return {"messages": [ask, {"role": "assistant", "content": answer}]}

    answers = ["Short. But more.", "A longer one here.", "A longer one now.", "Far too long to compare." * 3, "?"]
    rows = [row(f"w{i}", answer) for i, answer in enumerate(answers)]
    pairs = WORDNET["make_pairs"](rows, {f"w{i}": "ten letters" for i in range(5)})
    chosen = sorted(pair["chosen"][0]["content"] for pair in pairs)
    assert chosen[1] == "Short."
    assert chosen[0] in answers[1:3]
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["Ten letters."] * 2
