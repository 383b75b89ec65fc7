"""`benchmarks/gpu.py` where there is no GPU: its logic, and a whole run on the CPU with a tiny base."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_ways.setting import learned, packed, padded, rows_of  # noqa: E402

pytestmark = pytest.mark.slow


def run(*flags):
    return subprocess.run([sys.executable, BENCHMARKS / "gpu.py", *flags], capture_output=True, text=True, timeout=300)


def test_whole_run(tmp_path):
    out = tmp_path / "result.json"
    flags = ["--device", "cpu", "--size", "tiny", "--rows", "4", "--steps", "1", "--rounds", "1"]
    done = run(*flags, "--ways", "slimtune,peft packed,unsloth packed", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert len(result["checks"]) >= 13
    assert result["skipped"].keys() == {"unsloth packed"}
    for kind in ("no prefix", "prefix 64", "dictionary"):
        ours, theirs = (result["rows"][kind][way] for way in ("slimtune", "peft packed"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)  # the same rows, the same base, the same mean
        assert f"{theirs['slimtune_is_faster_by']:.2f}×" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_message():
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("got: no CUDA device that torch ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_failed_check_is_the_exit_code(ok, code, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(tmp_path / "result.json")])
    monkeypatch.setattr(gpu, "_checks", lambda *_: ({}, [{"check": "a", "value": 0.0, "limit": 1.0, "ok": ok}]))
    monkeypatch.setattr(gpu, "_run", lambda *_: None)
    with pytest.raises(SystemExit) as e:
        gpu.main()
    assert e.value.code == code


def test_ways_share_a_gpu_only_if_they_fit():
    ways, memory = ["slimtune", "peft packed", "ceiling"], {"free_bytes": 78 * gpu.GIB, "total_bytes": 80 * gpu.GIB}
    assert gpu._groups(ways, "1b", memory) == ([ways], True)
    assert gpu._groups(ways, "8b", memory) == ([[way] for way in (*ways, "slimtune")], False)


def test_ratios_are_taken_round_by_round():
    def turn(seconds):
        sizes = {"tokens": 100, "rows": 2, "parts": 1, "loss": None, "peak_allocated": 1, "peak_reserved": 1}
        return {"seconds": seconds, **sizes}

    turns = {"rows": {"slimtune": [turn(1), turn(2), turn(10)], "other": [turn(2), turn(6), turn(11)]}}
    assert gpu._row("rows", "other", turns, together=True)["slimtune_is_faster_by"] == 2.0
    assert gpu._row("rows", "other", turns, together=False)["slimtune_is_faster_by"] == 3.0
    assert gpu._row("rows", "other", turns, together=True)["tokens_per_second"] == 16.7


@pytest.mark.parametrize("kind", ["no prefix", "prefix 64", "dictionary"])
def test_every_process_draws_the_same_rows(kind):
    spec = {"size": "tiny", "model": None, "device": "cpu", "rows": 5, "steps": 1}
    rows = rows_of(spec, kind, 1, 0, 512)
    assert rows == rows_of(spec, kind, 1, 0, 512) != rows_of(spec, kind, 2, 0, 512)
    assert all(0 <= t < 512 for r in rows for t in r["input_ids"])
    assert (rows[0]["input_ids"][:64] == rows[1]["input_ids"][:64]) == (kind == "prefix 64")
    # However they are laid out, the same tokens are learned; a row's first is not predicted from the row before it.
    targets = sum(map(learned, rows))
    for batch in (packed(rows), padded(rows)):
        assert (batch["labels"][:, 1:] != -100).sum() == targets
