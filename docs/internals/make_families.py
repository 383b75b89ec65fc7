"""Write docs/families.md from what the tests found: `python docs/internals/make_families.py`.

`tests/core/models/test_family_table.py` checks the table's file, and writes it with `--update-families`.
"""

from __future__ import annotations

import json
from pathlib import Path

PAGE = Path(__file__).parents[1] / "families.md"
RESULTS = Path(__file__).parents[2] / "tests" / "core" / "models" / "family_table.json"
HEAD = """\
# Model families

What a LoRA on `all-linear` does on tiny random models of each family, from the results of
`tests/core/models/test_family_table.py`:

- **attach**: the adapter is attached to every linear layer (and to the experts, where there are any).
- **train**: one step has a finite loss that falls, and every adapted module gets a gradient; the others are named.
- **reload**: saved and loaded, the logits are the same. **PEFT**: HF PEFT loads the file and gives the same logits.
- **merge**: the merged model's logits are those of the adapter (float64, 1e-9).
- **packed**: rows packed into one sequence have the losses of rows alone (float64, 1e-9); else training pads them.
- **plan**, **run**: `slimtune plan` plans a run, and agrees with training about packing; `slimtune train` does one.

✓ works; a number is a note below the table.
"""


def make_page() -> str:
    """Return the page."""
    table: dict[str, dict[str, str]] = json.loads(RESULTS.read_text())
    steps = list(next(iter(table.values())))
    notes: list[str] = []
    lines = [f"| family | {' | '.join(steps)} |", "| --- |" + " :-: |" * len(steps)]
    for family, found in table.items():
        cells = []
        for what in found.values():
            if what not in ("works", "", *notes):
                notes.append(what)
            cells.append("✓" if what == "works" else f"{notes.index(what) + 1}" if what else "")
        lines.append(f"| {family} | {' | '.join(cells)} |")
    numbered = [f"{i}. {note.removeprefix('works; ')}" for i, note in enumerate(notes, 1)]
    return "\n".join([HEAD, *lines, "", *numbered, ""])


if __name__ == "__main__":
    PAGE.write_text(make_page())
