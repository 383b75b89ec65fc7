"""For whoever has a CUDA card: are the gradients right there, how fast is a LoRA step, and how much memory it takes.

    make gpu-bench                       or: python benchmarks/gpu.py [--size 1b] [--model FOLDER] [--ways slimtune,…]

Under ten minutes, no network: the base is a Llama with random weights (`--size 135m`, `1b` or `8b`), or a folder.
Beside slimtune run HF PEFT and, where they are installed, flash-attn, Liger and Unsloth: the same rows, each way in a
process of its own, in turns where all fit on the card together; else one after another, slimtune first and last.
Figures are medians over rounds, ratios are taken round by round; a first round is for compilers, and dropped.

Exit code 1: a gradient check failed. 2: there is no such device.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from gpu_ways.setting import DICTIONARY, KINDS, SIZES, WEIGHTS  # noqa: E402
from gpu_ways.ways import WAYS  # noqa: E402

Result = dict[str, Any]
GIB = 1 << 30


class Process:
    """A process that answers in JSON, a line each."""

    def __init__(self, module: str, arguments: list[str], log: Any) -> None:
        paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"gpu_ways.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **offline, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )

    def answer(self) -> Result | None:
        """Return its next line, None where it ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, what: Any) -> Result | None:
        assert self.process.stdin
        try:
            print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.answer()

    def end(self) -> int:
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait()


def main() -> None:
    args = _arguments()
    if fault := _no_device(args.device):
        print(fault, file=sys.stderr)
        sys.exit(2)
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out.with_suffix(".log").open("w")
    found, checks = _checks(args.device, log)
    print(", ".join(f"{k} {v}" for k, v in found.items() if v is not None))
    spec = {"size": args.size, "model": args.model, "device": args.device, "rows": args.rows, "steps": args.steps}
    base, free = args.model or args.size, found.get("free_bytes")
    if free is not None and free < 1.3 * _weights(base):
        need = f"{1.3 * _weights(base) / GIB:.0f} GiB"
        print(f"got: {free / GIB:.0f} GiB free; expected: {need} for {base}; fix: --size 1b or 135m", file=sys.stderr)
        sys.exit(2)
    groups, together = _groups(args.ways, base, found)
    turns: dict[str, dict[str, list[Result]]] = {kind: {} for kind in _kinds()}
    skipped: dict[str, str] = {}
    for left, ways in zip(range(len(groups), 0, -1), groups, strict=True):
        until = time.monotonic() + (60 * args.minutes - (time.monotonic() - began)) / left
        _run(ways, spec, args.rounds, until, log, turns, skipped)
    result = {
        "facts": found,
        "spec": spec,
        "together": together,
        "checks": checks,
        "rows": {kind: {way: _row(kind, way, turns, together) for way in turns[kind]} for kind in turns},
        "skipped": skipped,
        "seconds": round(time.monotonic() - began),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    _show(result)
    print(f"{result['seconds']} s; {args.out}, what libraries said: {args.out.with_suffix('.log')}")
    sys.exit(0 if checks and all(c["ok"] for c in checks) else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=SIZES, help="of a Llama with random weights")
    parser.add_argument("--model", default=None, help="a folder with a base instead")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","), help=", ".join(WAYS))
    parser.add_argument("--rows", default=64, type=int, help="of a step")
    parser.add_argument("--steps", default=2, type=int, help="of a turn")
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--minutes", default=9.0, type=float, help="rounds are left out once they are over")
    parser.add_argument("--out", default=Path("runs/gpu-bench.json"), type=Path)
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"unknown ways: {', '.join(sorted(unknown))}; there are: {', '.join(WAYS)}")
    return args


def _no_device(device: str) -> str:
    """Return why nothing can be run on a device, "" where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"got: no torch in {sys.executable}; expected: a CUDA build of torch; fix: PYTHON=… make gpu-bench"
    import torch

    if device == "cpu" or (device.startswith("cuda") and torch.cuda.is_available()):
        return ""
    return (
        f"got: no {'CUDA' if device.startswith('cuda') else device} device that torch {torch.__version__} finds; "
        "wanted: an NVIDIA card with a CUDA build of torch, or an AMD one with a ROCm build; "
        "fix: run it there (`slimtune doctor` shows what torch finds), or try the script with --device cpu --size tiny"
    )


def _kinds() -> list[str]:
    return [kind for kind in KINDS if kind != "dictionary" or DICTIONARY.is_file()]


def _checks(device: str, log: Any) -> tuple[Result, list[Result]]:
    """Run the gradient checks; return the device's facts, and each check."""
    process = Process("checks", [device], log)
    found: Result = {}
    checks = []
    while (said := process.answer()) is not None:
        if "facts" in said:
            found = said["facts"]
        else:
            checks.append(said)
            print(f"{'ok    ' if said['ok'] else 'FAILED'} {said['check']}: {said['value']:.1e} (< {said['limit']:g})")
    if process.end():
        checks.append({"check": "the checks ran to their end", "value": 1.0, "limit": 0.0, "ok": False})
        print(f"FAILED the checks ended early: see {log.name}")
    return found, checks


def _weights(base: str) -> int:
    """Return the bytes of a base's weights."""
    return WEIGHTS.get(base) or sum(f.stat().st_size for f in Path(base).glob("*.safetensors"))


def _groups(ways: list[str], base: str, found: Result) -> tuple[list[list[str]], bool]:
    """Return which ways stay on the card together, and whether all do."""
    if "free_bytes" not in found:
        return [ways], True
    # Half of the card for the one that runs, and half a GiB of CUDA's own for each that waits.
    if len(ways) * (_weights(base) + GIB / 2) < found["free_bytes"] - found["total_bytes"] / 2:
        return [ways], True
    return [[way] for way in ways] + ([["slimtune"]] if "slimtune" in ways and len(ways) > 1 else []), False


def _run(
    ways: list[str],
    spec: Result,
    rounds: int,
    until: float,
    log: Any,
    turns: dict[str, dict[str, list[Result]]],
    skipped: dict[str, str],
) -> None:
    """Measure ways in turns until the rounds or the time are over."""
    workers: dict[str, Process] = {}
    for way in ways:
        if time.monotonic() > until:
            skipped.setdefault(way, "no time was left")
            continue
        workers[way] = Process("worker", [json.dumps(spec), way], log)
    for way, worker in list(workers.items()):
        said = worker.answer()
        if not said or "absent" in said:
            skipped[way] = said["absent"] if said else f"it failed: see {log.name}"
            workers.pop(way).end()
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            break
        for kind in turns:
            for way, worker in list(workers.items()):
                said = worker.ask([kind, number])
                if said is None:
                    skipped[way] = f"it failed: see {log.name}"
                    workers.pop(way).end()
                elif number:  # the first one compiles
                    turns[kind].setdefault(way, []).append(said)
    for worker in workers.values():
        worker.end()


def _row(kind: str, way: str, turns: dict[str, dict[str, list[Result]]], together: bool) -> Result:
    own, ours = turns[kind][way], turns[kind].get("slimtune", [])
    speed = statistics.median(t["tokens"] / t["seconds"] for t in own)
    if together:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, own, strict=False)]
        faster = statistics.median(ratios) if ratios else None
    else:
        faster = statistics.median(t["tokens"] / t["seconds"] for t in ours) / speed if ours else None
    return {
        "tokens_per_second": round(speed, 1),
        "rows_per_second": round(statistics.median(t["rows"] / t["seconds"] for t in own), 2),
        "slimtune_is_faster_by": round(faster, 3) if faster else None,
        "rounds": len(own),
        "passes": own[-1]["parts"],
        "loss": own[0]["loss"],
        "peak_allocated": max(t["peak_allocated"] for t in own),
        "peak_reserved": max(t["peak_reserved"] for t in own),
    }


def _show(result: Result) -> None:
    spec = result["spec"]
    turns = "in turns" if result["together"] else "one after another, slimtune first and last"
    for kind, ways in result["rows"].items():
        print(f"\n{kind}: {spec['model'] or spec['size']}, {spec['rows']} rows a step, {turns}")
        heads = ("tokens/s", "rows/s", "slimtune", "peak GiB", "reserved", "parts", "loss")
        print(f"  {'':24}" + "".join(f"{h:>{n}}" for h, n in zip(heads, (10, 9, 10, 10, 10, 7, 9), strict=True)))
        for way, row in ways.items():
            faster = f"{row['slimtune_is_faster_by']:.2f}×" if row["slimtune_is_faster_by"] else ""
            peaks = "".join(f"{row[k] / GIB:10.2f}" for k in ("peak_allocated", "peak_reserved"))
            loss = f"{row['loss']:.4f}" if row["loss"] is not None else ""
            print(
                f"  {way:24}{row['tokens_per_second']:10.0f}{row['rows_per_second']:9.1f}{faster:>10}{peaks}"
                f"{row['passes']:7}{loss:>9}"
            )
    for way, why in result["skipped"].items():
        print(f"  {way}: {why}")


if __name__ == "__main__":
    main()
