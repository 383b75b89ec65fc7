"""The wall clock of a whole training: ours beside peers' scripts, each a process of its own, in turns.

    make wall          sets up both environments and runs it
    python benchmarks/wall.py [--rows 128] [--rounds 3] [--ways slimtune peft-tour ...] [--json FILE]

Each way reads the same JSONL rows of The Devil's Dictionary, prepares them, trains r = 16 on all linear maps for one
epoch of 8 rows a step on SmolLM2-135M and writes the adapter. Counted is all of it but imports and loading the base,
which stand beside. The scripts are in `wall_ways/`; what they share with a user's own is on purpose.

    slimtune      what `slimtune train` runs
    peft-tour     PEFT's quick tour: transformers' Trainer, fp32, dropout 0.1, padded
    peft-best     the same Trainer with bf16 weights and transformers' own padding-free collator
    trl           SFTTrainer with packing, bf16 weights
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
ROWS = ROOT / "examples/devils-dictionary/train.jsonl"
PEERS = ROOT / ".venv-peers/bin/python"
WAYS = ("slimtune", "peft-tour", "peft-best", "trl")


def base_folder(folder: Path) -> str:
    """Save the base once as peers load it."""
    from slimtune.core.models.loader import load_base

    base = load_base("smollm2-135m", dtype="bfloat16")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def run(way: str, base: str, rows: Path, out: Path, peers: Path) -> dict[str, float]:
    python = sys.executable if way == "slimtune" else str(peers)
    script = HERE / "wall_ways" / ("ours.py" if way == "slimtune" else "peers.py")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [python, str(script), way, base, str(rows), str(out)], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--peers", type=Path, default=PEERS, help="python of the peers' environment")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text("".join(line + "\n" for line in ROWS.read_text().splitlines()[: args.rows]))
        base = base_folder(Path(folder, "base"))
        for turn in range(args.rounds):
            shift = turn % len(args.ways)
            for way in args.ways[shift:] + args.ways[:shift]:
                found[way].append(run(way, base, rows, Path(folder, f"{way}-{turn}"), args.peers))
                print(f"round {turn}: {way} {json.dumps(found[way][-1])}", file=sys.stderr, flush=True)
    ours_name, ours = args.ways[0], found[args.ways[0]]
    print(
        f"| {args.rows} rows, one epoch | seconds | of it preparing data | loading beside | {ours_name} is faster by |"
    )
    print("| --- | --- | --- | --- | --- |")
    for way, turns in found.items():
        middle = {k: statistics.median(t[k] for t in turns) for k in ("seconds", "prepare", "load")}
        ratio = statistics.median(t["seconds"] / o["seconds"] for t, o in zip(turns, ours, strict=True))
        faster = "" if way == args.ways[0] else f"{ratio:.2f}×"
        print(f"| {way} | {middle['seconds']:.1f} | {middle['prepare']:.1f} | {middle['load']:.1f} | {faster} |")
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "rounds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
