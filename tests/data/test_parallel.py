"""Work over several processes: the results of one, the same errors, and nothing left of it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from parallel_functions import dies, refuses
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data import parallel
from slimtune.data.dataset import open_rows
from slimtune.data.formats import Row
from slimtune.data.parallel import parallel_map
from slimtune.data.tokenize import tokenize_dataset
from slimtune.errors import ModelError, RunError

GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
TOK = make_tokenizer(template_text("gemma"), GEMMA)
MANY = 2 * 512 + 76


def row(i, **more):
    said = [{"role": "user", "content": f"Define {i}."}, {"role": "assistant", "content": f"A lie {i}."}]
    return Row(said, i + 1, **more)


def encoded(rows, processes, tok=TOK):
    return tokenize_dataset(rows, tok, max_seq_len=99, path="a.jsonl", processes=processes)


@pytest.fixture
def no_serial_batches(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_BATCHES", 0)


def left():
    """Processes that are still there; Python's own, which looks after what they share, stays."""
    return [c for c in psutil.Process().children() if "resource_tracker" not in " ".join(c.cmdline())]


def test_several_processes_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_BATCHES", 1)
    rows = [row(i) for i in range(MANY)]
    (one, report), (two, again) = encoded(rows, 1), encoded(rows, 2)
    assert report == again
    assert list(one) == list(two)
    assert two[MANY - 1]["line"] == MANY
    assert left() == []


def test_an_error_in_a_process_is_the_same_error(no_serial_batches):
    with pytest.raises(ModelError) as fault:
        list(parallel_map(refuses, range(9), 2))
    assert str(fault.value) == "got it\n  expected: wanted it\n  hint: fix it"
    assert left() == []


def test_a_process_that_dies_is_an_error(no_serial_batches):
    with pytest.raises(RunError, match="tokenizes rows died"):
        list(parallel_map(dies, range(9), 2))
    assert left() == []


def test_few_batches_start_no_process():
    assert list(parallel_map(lambda batch: batch + os.getpid(), range(16), 2)) == [os.getpid() + i for i in range(16)]


def test_batches_are_read_as_they_are_needed(no_serial_batches):
    read = []
    found = parallel_map(abs, (read.append(i) or i for i in range(99)), 2)
    assert next(found) == 0
    assert len(read) <= 7
    found.close()


KILLED = """
import sys, time
from slimtune.data import parallel
if __name__ == "__main__":
    parallel.SERIAL_BATCHES = 0
    for batch in parallel.parallel_map(time.sleep, iter(lambda: 0.1, None), 2):
        print("going", flush=True)
"""


def test_killed_it_leaves_no_process(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    with subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"going\n"
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_examples_are_found_again_in_any_choice(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A minor form of despair, disguised as a virtue.\n\n" * 700)
    examples, report = encoded(open_rows(path), 1)
    assert (len(examples), report.kept) == (700, 700)
    assert examples.lengths.sum() == report.tokens
    kept = examples.select(examples.lengths.argsort(kind="stable")[:3])
    assert [e["line"] for e in kept] == [1, 3, 5]
    assert kept[0]["labels"][1:] == kept[0]["input_ids"][1:]
    assert [e["line"] for e in kept[1:]] == [3, 5]
