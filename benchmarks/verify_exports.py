"""SmolLM2 tuned several ways on The Devil's Dictionary, shipped, and asked: `make verify`, in about a quarter hour.

    python benchmarks/verify_exports.py [--steps 12] [--folder FOLDER] [--ways lora rslora …]

Each way trains for a few steps, as far as it needs to say something else than the base. Then `slimtune verify` asks the
merged folder, the adapter's GGUF beside an f32 base in llama.cpp, and the merged GGUF. For the LoRA the q/k permutation
is then left out on purpose: the gate has to notice. What is no LoRA has to be refused as an adapter, and ships merged
where it is a change of weights. Exit code 1: something was not as said.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from slimtune.cli.check_command import make_engine_agreement_table
from slimtune.errors import RunError, SlimtuneError
from slimtune.export.exporter import export
from slimtune.export.verify import verify

ROWS = Path(__file__).parents[1] / "examples/devils-dictionary"
RECIPE = [ROWS.with_suffix(".yaml")]
HELD = f"data.validation={ROWS / 'validation.jsonl'}"
OTHERS = ["--model", "smollm2-135m", "--data", ROWS / "train.jsonl", "--set", HELD, "--batch-size", 8]
"""The recipe is a LoRA's: it names a rank."""
LORAS = {
    "lora": RECIPE,
    "rslora": [*RECIPE, "--set", "method.use_rslora=true"],
    "patterns": [
        *RECIPE, "--set", "method.rank_pattern={o_proj: 8}", "--set", "method.alpha_pattern={down_proj: 8}"
    ],
}  # fmt: skip
MERGED = {"dora": [*RECIPE, "--set", "method.use_dora=true"], "ia3": [*OTHERS, "--method", "ia3"]}
BESIDE = {name: [*OTHERS, "--method", name] for name in ("bottleneck", "prefix_tuning", "prompt_tuning")}
ADAPTER = "llama.cpp, adapter GGUF"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {**LORAS, **MERGED, **BESIDE}
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="keeps the runs; those that are there are not trained again")
    parser.add_argument("--ways", nargs="+", choices=every, default=list(every), metavar="NAME")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as gone:
        folder = args.folder or Path(gone)
        faults = [f for way in args.ways for f in asked(way, every[way], folder, args)]
    for fault in faults:
        print(f"NOT AS SAID: {fault}")
    sys.exit(bool(faults))


def asked(way: str, flags: list[Any], folder: Path, args: argparse.Namespace) -> list[str]:
    run = folder / way
    if not run.exists():
        command = [sys.executable, "-m", "slimtune", "train", *flags, "--out", run, "--max-steps", args.steps]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"training {way} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")
    found = verify(run, threads=args.threads)
    screen = Console(width=140)
    screen.print(f"\n[bold]{way}[/]", make_engine_agreement_table(found.checks), sep="\n")
    for check in found.checks:
        if check.reason:
            screen.print(f"{check['engine']}: {check['reason']}", markup=False)
    passed = {c.engine: c.passed for c in found.checks}
    wanted = {ADAPTER: True if way in LORAS else None}
    wanted |= dict.fromkeys(("merged folder", "llama.cpp, merged GGUF"), None if way in BESIDE else True)
    faults = [
        f"{way}: {name} is {passed[name]}, not {want}" for name, want in wanted.items() if passed[name] is not want
    ]
    if way == "lora":
        with patch("slimtune.export.gguf.permute_rope_rows", lambda rows, *_: rows):
            faults += refused(run, "gguf", {}, RunError, "the q/k permutation left out", args.threads)
    if way not in LORAS:
        for to in ("gguf", "ollama", "vllm"):
            faults += refused(run, to, {"merged": False}, SlimtuneError, f"{way} to {to}", args.threads)
    return faults


def refused(
    run: Path, to: str, wish: dict[str, Any], kind: type[Exception], what: str, threads: int | None
) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            export(run, to, Path(folder, "out"), wish, threads=threads)  # type: ignore[arg-type]
        except kind as error:
            print(f"{what}: {' / '.join(str(error).splitlines())}")
            return [] if not Path(folder, "out").exists() else [f"{what}: something was left"]
    return [f"{what} was not refused"]


if __name__ == "__main__":
    main()
