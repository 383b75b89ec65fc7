"""Work in several processes: the results and errors of one, and no process left."""

import os
import pickle
import signal
import subprocess
import sys

import psutil
import pytest
from parallel_functions import exit_at_3, refuse_3
from tiny_tokenizer import GEMMA_TOK as TOK

from slimtune.core.data import parallel
from slimtune.core.data.parallel import parallel_map
from slimtune.core.data.rows import Row
from slimtune.core.data.tokenize import BatchTokenizer, tokenize_dataset
from slimtune.errors import ModelError, RunError
from slimtune.evaluation.data_report.report_builder import DataReportBuilder


@pytest.fixture(autouse=True)
def others() -> set[psutil.Process]:
    """Processes that other tests of this one left."""
    return set(psutil.Process().children())


@pytest.fixture(autouse=True)
def few_serial_batches(monkeypatch, request):
    monkeypatch.setattr(parallel, "SERIAL_BATCHES", 1 if "tokenized" in request.node.name else 0)


def remaining_processes(others):
    """Child processes that are new and still there, without Python's own resource tracker."""
    new = set(psutil.Process().children()) - others
    return [c for c in new if "resource_tracker" not in " ".join(c.cmdline())]


@pytest.mark.slow
def test_tokenized_rows_are_those_of_one_process(others):
    turns = [[("user", f"Define {i}."), ("assistant", f"A lie {i}.")] for i in range(2 * 512 + 76)]
    rows = [Row([{"role": r, "content": c} for r, c in turn], i + 1) for i, turn in enumerate(turns)]
    (one, report), (two, again) = (
        tokenize_dataset(rows, TOK, max_seq_len=99, source_path="a", processes=n) for n in (1, 2)
    )
    assert report == again
    assert list(one) == list(two)
    assert two[len(rows) - 1]["line"] == len(rows)
    assert remaining_processes(others) == []


def test_errors_are_those_of_one_process(others):
    with pytest.raises(ModelError) as error:
        list(parallel_map(refuse_3, range(9), 2))
    assert str(error.value) == "message\n  expected: expected\n  hint: hint"
    with pytest.raises(RunError, match="process"):
        list(parallel_map(exit_at_3, range(9), 2))
    assert remaining_processes(others) == []


def test_few_batches_start_no_process(monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL_BATCHES", 16)
    assert list(parallel_map(lambda batch: batch + os.getpid(), range(16), 2)) == [os.getpid() + i for i in range(16)]


def test_batches_are_read_as_they_are_needed():
    read = []
    found = parallel_map(abs, (read.append(i) or i for i in range(99)), 2)
    assert next(found) == 0
    assert len(read) <= 7
    found.close()


def test_workers_load_neither_torch_nor_arrow(tmp_path):
    """Each would cost a process 50 to 200 MB."""
    function = BatchTokenizer(TOK, 99, "drop", "assistant", DataReportBuilder(TOK, "chat", 99).measure_batch)
    (tmp_path / "function").write_bytes(pickle.dumps(function))
    script = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print({'torch', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "function"], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


KILLED = """
import time
from slimtune.core.data import parallel
if __name__ == "__main__":
    parallel.SERIAL_BATCHES = 0
    for batch in parallel.parallel_map(time.sleep, iter(lambda: 0.1, None), 2):
        print("started", flush=True)
"""


def test_killed_parent_leaves_no_process(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    with subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(children, timeout=60)[1] == []
