"""QLoRA beside LoRA: the demo's recipe on the base in bf16 and on the same base in fewer bits; held-out loss of both.

    python benchmarks/qlora.py [WAY ...] [--steps 98] [--out runs/qlora]          WAY: bf16 nf4 nf4-loftq nf4-8bit int8

Each way is `slimtune train` in a process of its own, then `slimtune eval` on the test rows and `slimtune merge`, which
proves what it writes. What is done already is not done again: stop it, and start it again. `apart` is the tuned loss
beside that of bf16.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
RECIPE = HERE / "examples/devils-dictionary.yaml"
WAYS = {
    "bf16": [],
    "nf4": ["--quantization", "nf4"],
    "nf4-loftq": ["--quantization", "nf4", "--set", "method.init_lora_weights=loftq"],
    "nf4-8bit": ["--quantization", "nf4", "--optimizer", "adamw-8bit"],
    "int8": ["--quantization", "int8"],
}


def slimtune(*arguments: str) -> dict:
    """Run a verb; return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "slimtune", *arguments, "--json"], stdout=subprocess.PIPE)
    said = json.loads(done.stdout or "{}")
    if done.returncode and "verdict" not in said:  # a run that is not better is a result, too
        sys.exit(done.returncode)
    return said


def measured(way: str, steps: int, out: Path) -> dict:
    run, merged = out / way, out / f"{way}-merged"
    if not (run / "result.json").is_file():
        more = ["--resume"] if run.is_dir() else []
        given = ["--dtype", "bf16", *WAYS[way], "--max-steps", str(steps), "--out", str(run)]
        slimtune("train", str(RECIPE), *given, *more)
    if not (run / "eval-test.json").is_file():
        slimtune("eval", str(run))
    kept = out / f"{way}-merge.json"
    if not kept.is_file():
        kept.write_text(json.dumps(slimtune("merge", str(run), "--out", str(merged))))
    return {
        **json.loads((run / "result.json").read_text()),
        **json.loads((run / "eval-test.json").read_text()),
        "merge": json.loads(kept.read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help="which; bf16 and nf4, if none is named")
    parser.add_argument("--steps", type=int, default=98, help="optimizer steps of 8 rows; 98 are one pass")
    parser.add_argument("--out", type=Path, default=HERE / "runs/qlora")
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"{', '.join(sorted(unknown))}: one of {', '.join(WAYS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {way: measured(way, args.steps, args.out) for way in args.ways or ["bf16", "nf4"]}
    print(f"{'way':10} {'base':>7} {'tuned':>7} {'apart':>7} {'tok/s':>6} {'peak GiB':>9} {'merge d':>8} {'effect':>7}")
    beside = found.get("bf16", {}).get("tuned_loss")
    for way, r in found.items():
        apart = f"{r['tuned_loss'] - beside:+.4f}" if beside is not None else "-"
        print(
            f"{way:10} {r['base_loss']:7.4f} {r['tuned_loss']:7.4f} {apart:>7} {r['tokens_per_second']:6.0f} "
            f"{r['peak_bytes'] / 2**30:9.2f} {r['merge']['mean_difference']:8.4f} {r['merge']['effect']:7.3f}"
        )


if __name__ == "__main__":
    main()
