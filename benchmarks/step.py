"""One optimizer step of LoRA, ours beside HF PEFT and TRL: same rows, same machine, in turns. `make bench` runs it.

    python benchmarks/step.py [--rounds 5] [--steps 1] [--rows plain|system|default|both] [--ways NAME …]

Every way is a process of its own (`step_ways/`), the peers' in an environment of theirs without slimtune. All train
r = 16 on all linear maps but the head, with AdamW, on the same rows in the same steps; all wait while one runs. A
round runs each way once, in an order that turns from round to round, so a machine that slows down slows all of them;
figures are medians over rounds, ratios are those of two medians, and the first round warms up. Three groups run one
after the other, each beside ours: the peers at their best with fp32 adapters, the quick tours, and the peers at their
best with 16-bit adapters, beside ours with such. All ways' first losses have to agree, or the run ends: they are of the
same rows from the same start.

Three tables: the ways on rows without a shared beginning, the ways on rows with a shared system prompt, and our step
with one lever off at a time. The ceiling, the frozen weights' bare products, is measured right before and after our
step without sharing. Peak memory is each process's own, the base's weights and the libraries included.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from step_ways import tables
from step_ways.running import HERE, in_turns, say
from step_ways.tables import LEVERS

PEERS = Path(__file__).parents[1] / ".venv-peers/bin/python"
SESSIONS = (
    ("ours", "peft-padded", "peft-sorted", "peft-packed", "peft-packs", "trl", "trl-packs", "trl-autocast"),
    ("ours", "peft-tour", "peft-tour-auto"),
    ("ours-bf16", "peft-padded-bf16", "peft-sorted-bf16", "peft-packed-bf16", "peft-packs-bf16", "trl-bf16",
     "trl-packs-bf16"),
)  # fmt: skip
"""What runs in turns together: what is compared, and as much as lies in 16 GB at once."""
NAMES = tuple(dict.fromkeys([*sum(SESSIONS, ()), *LEVERS]))
IF_ASKED = (
    "peft-padded", "peft-padded-bf16", "peft-sorted", "peft-sorted-bf16", "trl", "trl-bf16", "trl-autocast",
)  # fmt: skip
"""Seen to be no faster than another way of the same peer, by name only: all of them take half an hour."""
FEWER = 3
"""Rounds of the quick tours and of the levers, at most: their figures are far apart, or no promise."""
BF16_ONLY = ("peft-tour-auto", "trl-autocast")
"""With fp32 weights another way is the same."""
PACKS = {"plain": 2, "system": 4, "default": 2}
"""Into how many passes the peers' ways that have several divide 8 rows: of 1, 2, 4 and 8 the fastest here."""
KINDS = {
    "plain": "Rows without a shared beginning",
    "system": "Rows with a shared system prompt",
    "default": "The demo's rows",
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def prepared(args: argparse.Namespace, folder: Path, kinds: list[str]) -> dict[str, Path]:
    """Encode the rows and save the base, in a process that ends; return each kind's spec for its workers."""
    common = {"model": args.model, "dtype": args.dtype, "seed": 0, "base": str(folder / "base")}
    first = folder / "prepare.json"
    first.write_text(json.dumps({**common, "rows": str(folder / "rows.json"), "kinds": kinds}))
    subprocess.run([sys.executable, str(HERE / "rows.py"), str(first)], check=True, stdout=sys.stderr)
    made = json.loads((folder / "rows.json").read_text())
    specs = {}
    for kind in kinds:
        rows, at, rounds = made["kinds"][kind], 0, []
        for steps in [1, *[args.steps] * args.rounds]:  # one step warms up
            numbers = [i % len(rows) for i in range(at, at + steps * args.batch)]
            rounds.append([numbers[i : i + args.batch] for i in range(0, len(numbers), args.batch)])
            at += steps * args.batch
        packs = {"packs": args.packs or PACKS[kind]}
        spec = {**packs, "pad_token_id": made["pad_token_id"], "lora": LORA, "learning_rate": 5e-4, "rounds": rounds}
        specs[kind] = folder / f"{kind}.json"
        specs[kind].write_text(json.dumps({**common, **spec, "rows": rows}))
    return specs


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that was asked for; return each table's figures under its title."""
    kinds = ["plain", "system"] if args.rows == "both" else [args.rows]

    def asked(way: str) -> bool:
        runs = args.dtype == "bfloat16" or not (way in BF16_ONLY or way.endswith("-bf16"))
        return runs and (way in args.ways if args.ways else way not in IF_ASKED)

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        specs = prepared(args, Path(folder), kinds)
        for kind, spec in specs.items():
            part = results[KINDS[kind]] = {"ways": {}}
            for own, *ways in SESSIONS:
                ways = [w for w in ways if asked(w)]
                if not ways and not (args.ways and own in args.ways):
                    continue
                # Where rows share nothing, ours is what the ceiling is of.
                beside = own if kind == "plain" and own == "ours" and "ceiling" not in part else None
                rounds = min(args.rounds, FEWER) if "peft-tour" in ways else args.rounds
                found = in_turns([own, *ways], spec, beside, rounds, args.peers)
                part |= found | {"ways": found["ways"] | part["ways"]}
            part["ways"] = {name: part["ways"][name] for name in NAMES if name in part["ways"]}
        if levers := [w for w in LEVERS if asked(w)]:
            beside = "no-sharing" if "no-sharing" in levers else None
            title = f"One lever off at a time. {KINDS[kinds[-1]]}"
            results[title] = in_turns(["ours", *levers], specs[kinds[-1]], beside, min(args.rounds, FEWER), args.peers)
    return {title: part for title, part in results.items() if part["ways"]}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps a round")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--rows", choices=(*KINDS, "both"), default="both", help="both: plain and system")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--ways", nargs="+", choices=NAMES, help="these alone, beside ours", metavar="NAME")
    parser.add_argument("--packs", type=int, help=f"passes of the peers' ways that have several; by default {PACKS}")
    parser.add_argument("--peers", default=str(PEERS), help="the peers' Python")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not Path(args.peers).exists():
        say(f"{args.peers} is not there (`make bench` makes it): the peers run in the environment of slimtune")
        args.peers = sys.executable
    results = measured(args)
    setting = f"{args.model}, {args.dtype}, {args.batch} rows a step, {args.rounds} rounds of {args.steps} steps"
    text = tables.report(results, f"{setting}; {processor()}")
    if args.json:
        given = {name: value for name, value in vars(args).items() if name not in ("json", "table")}
        args.json.write_text(json.dumps({"arguments": given, "processor": processor(), "parts": results}, indent=1))
    for part in results.values():
        tables.check(part["ways"], 0.02 if args.dtype == "bfloat16" else 0.002)
    (args.table.write_text if args.table else print)(text)


if __name__ == "__main__":
    main()
