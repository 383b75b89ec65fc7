"""Write the table of verifiable tasks in docs/grpo.md from benchmarks/data/grpo_tasks.jsonl.

The lines are those that `benchmarks/grpo_tasks.py` wrote.
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/grpo.md"
RUNS = ROOT / "benchmarks/data/grpo_tasks.jsonl"
BEGIN, END = "<!-- table: docs/internals/make_grpo_tasks.py -->\n", "<!-- end of the table -->\n"


def make_page() -> str:
    """Return the page with its table."""
    script = runpy.run_path(str(ROOT / "benchmarks/grpo_tasks.py"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table = script["format_table"](sorted(script["read_results"](RUNS), key=lambda run: run["task"]))
    return f"{before}{BEGIN}\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
