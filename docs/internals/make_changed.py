"""Write the table of docs/changed.md from the cases of the tests: `python docs/internals/make_changed.py`.

`tests/extras/test_training_fingerprint.py` runs each of its cells.
"""

from __future__ import annotations

import runpy
from pathlib import Path

PAGE = Path(__file__).parents[1] / "changed.md"
CASES = Path(__file__).parents[2] / "tests" / "changed_since_training.py"
BEGIN, END = "<!-- table: docs/internals/make_changed.py -->\n", "<!-- end of the table -->\n"


def make_table() -> str:
    """Return the table: a line for each change, a column for each use."""
    cases = runpy.run_path(str(CASES))
    uses, expect = cases["USES"], cases["expect"]
    lines = [f"| what changed | {' | '.join(f'`{use}`' for use in uses)} |", "| --- |" + " :-: |" * len(uses)]
    for change in cases["CHANGES"]:
        cells = []
        for use in uses:
            run, folder, copy = (expect(change.part, use, form) for form in cases["FORMS"])
            assert run == copy
            no_effect = "" if folder == run or use == "resume" else " ¹"
            cells.append(f"{'—' if run == 'harmless' else run}{no_effect}")
        lines.append(f"| {change.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def make_page() -> str:
    """Return the page with its table."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(make_page())
