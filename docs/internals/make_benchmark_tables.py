"""Write the tables of pages that a script of benchmarks/ formats from its recorded results.

Between `<!-- table: benchmarks/NAME.py -->` and its end is the script's `format_table` of benchmarks/data/NAME.jsonl.
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {"docs/grpo.md": "grpo_tasks", "docs/distill.md": "sdft", "docs/export.md": "kept_gain"}
END = "<!-- end of the table -->\n"


def make_page(page: str) -> str:
    """Return a page with its table."""
    name = PAGES[page]
    sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts there import one another
    script = runpy.run_path(str(ROOT / f"benchmarks/{name}.py"))
    table = script["format_table"](script["read_results"](ROOT / f"benchmarks/data/{name}.jsonl"))
    begin = f"<!-- table: benchmarks/{name}.py -->\n"
    before, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(begin)
    return f"{before}{begin}\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(make_page(page), encoding="utf-8")
