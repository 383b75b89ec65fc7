"""The example's rows: counts, clean text, one split per headword; and the script's rules on a piece of the source."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimtune.data.dataset import read_rows

FOLDER = Path(__file__).parents[2] / "examples" / "devils-dictionary"
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


def word(row):
    return re.fullmatch(r'Define "(.+)"\.', row.messages[0]["content"])[1]


def make(*args):
    return subprocess.run([sys.executable, FOLDER / "make.py", *args], capture_output=True, text=True, check=False)


def test_counts_and_shares():
    assert {split: len(rows) for split, rows in SPLITS.items()} == {"train": 779, "validation": 96, "test": 93}


def test_headwords_are_in_one_split_only():
    words = {split: {word(row) for row in rows} for split, rows in SPLITS.items()}
    assert not words["train"] & (words["validation"] | words["test"])
    assert not words["validation"] & words["test"]
    assert {"un-American", "I", "King's evil"} < set().union(*words.values())


def test_answers_are_one_clean_paragraph():
    answers = [row.messages[1]["content"] for rows in SPLITS.values() for row in rows]
    for said in answers:
        assert said == " ".join(said.split()), "verse keeps its lines and indentation"
        assert not re.search(r"[\[\]{}_]|\bG\.J\.|\(See ", said), said
        assert said[0].isupper() or said[0] in '("', said
        assert said.endswith((".", "!", "?", '"', ")")), said
        assert len(said) <= 950
    assert len(answers) == len(set(answers))


def test_the_public_domain_notice_is_kept():
    notice = (FOLDER / "NOTICE").read_text()
    assert "A Public Domain Text, Copyright Expired" in notice
    assert "AMBROSE BIERCE" in notice


def test_the_script_on_a_piece_of_the_source(tmp_path):
    source = tmp_path / "devil.dict.dz"
    source.write_bytes(gzip.compress(SOURCE.encode()))
    done = make("--dict", source, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [x for split in SPLITS for x in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
    rows = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    assert sorted(rows) == [
        ['Define "Allah".', "The Mahometan Supreme Being."],
        ['Define "abasement".', "A decent and customary mental attitude in the presence of wealth of power."],
        ['Define "abrupt".', "Sudden, like the arrival of a cannon-shot. Said of another author."],
        ['Define "academy".', "A modern school where football is taught."],
    ]
    for split in SPLITS:  # the hash alone decides: the same word, the same file
        got = {json.loads(x)["messages"][0]["content"] for x in (tmp_path / f"{split}.jsonl").read_text().splitlines()}
        assert got <= {row.messages[0]["content"] for row in SPLITS[split]}


def test_missing_dictionary(tmp_path):
    done = make("--dict", tmp_path / "none.dz", "--out", tmp_path)
    assert done.returncode == 2
    assert "apt-get install dict-devil" in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.skipif(not Path("/usr/share/dictd/devil.dict.dz").is_file(), reason="dict-devil is not installed")
def test_the_files_are_what_the_script_makes(tmp_path):
    assert make("--out", tmp_path).returncode == 0
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()
