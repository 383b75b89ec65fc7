"""Write the demo's figures into the README: `make_demo.py [RUN]`, after `make demo`."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "runs" / "devils-dictionary"
SENTENCE = re.compile(r"falls from \S+ to \S+ nats per token \(a\s+reduction of [^;]+; the adapter has\s+\S+ MB")


def make_readme(run: Path = RUN) -> str:
    """Return the README with the figures that the demo's run and its evaluation wrote."""
    result, found = (json.loads((run / name).read_text()) for name in ("result.json", "eval-test.json"))
    low, high = found["loss_reduction_ci95"]
    sentence = (
        f"falls from {found['base_loss']:.2f} to {found['tuned_loss']:.2f} nats per token (a reduction of "
        f"{found['loss_reduction']:.2f}, 95 % interval {low:.2f} to {high:.2f}); the adapter has\n"
        f"{result['adapter_bytes'] / 1e6:.1f} MB"
    )
    return SENTENCE.sub(lambda _: sentence, (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    (ROOT / "README.md").write_text(make_readme(Path(*sys.argv[1:2]) if sys.argv[1:] else RUN), encoding="utf-8")
