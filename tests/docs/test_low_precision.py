"""The table of runs in 16 bits is what its script writes from the recorded runs."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_table_is_fresh():
    script = runpy.run_path(str(ROOT / "benchmarks/low_precision.py"))
    table = script["make_table"](ROOT / "benchmarks/data/low_precision.jsonl")
    assert table in (ROOT / "docs/bases.md").read_text("utf-8")
