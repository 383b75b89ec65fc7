"""How fast `slimtune data` reads a large file, and how much memory it takes.

    python benchmarks/data_report.py                   # 1,000,000 chat rows, made in a temporary folder
    python benchmarks/data_report.py --rows 100000     # fewer, to try it

Rows are made of words of The Devil's Dictionary: a system prompt that all share, a question, an answer of 20 to 90
words; one row in 200 repeats an earlier one. `slimtune data --json` runs in a process of its own. Twice a second the
memory and the processor time of it and of all processes it started are read: resident memory (RSS, which counts what
they share once for each) and proportional memory (PSS, which counts it once).

Exit code 1 where the proportional memory was over `--most` GB, or the repeated rows are not the ones found.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

DICTIONARY = Path(__file__).parents[1] / "examples" / "devils-dictionary" / "train.jsonl"
SYSTEM = "You are the author of a dictionary. Define the word you are given in the manner of Ambrose Bierce."


def write_rows(path: Path, rows: int) -> int:
    """Write the rows; return how many repeat another."""
    said = [json.loads(line)["messages"] for line in DICTIONARY.read_text(encoding="utf-8").splitlines()]
    words = " ".join(m["content"] for messages in said for m in messages).split()
    draw, repeated, earlier = random.Random(0), 0, ""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            if i % 200 == 199:
                file.write(earlier)
                repeated += 1
                continue
            question = f"Define what number {i} of the list means: {' '.join(draw.choices(words, k=4))}"
            answer = " ".join(draw.choices(words, k=draw.randint(20, 90)))
            turns = [("system", SYSTEM), ("user", question), ("assistant", answer)]
            line = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"
            file.write(line)
            if i % 200 == 0:
                earlier = line
    return repeated


def run_and_measure(command: list[str]) -> tuple[str, dict[str, float]]:
    """Run a command; return its stdout, and the seconds, most memory in bytes and busy seconds of its processes."""
    began = time.perf_counter()
    cpu_seconds: dict[int, float] = {}
    most = {"rss": 0.0, "pss": 0.0, "processes": 0.0}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            try:
                root = psutil.Process(process.pid)
                tree = [root, *root.children(recursive=True)]
                rss = pss = 0
                for p in tree:
                    rss += p.memory_info().rss
                    pss += p.memory_full_info().pss
                    spent = p.cpu_times()
                    cpu_seconds[p.pid] = spent.user + spent.system
                most = {"rss": max(most["rss"], rss), "pss": max(most["pss"], pss),
                        "processes": max(most["processes"], len(tree))}  # fmt: skip
            except psutil.Error:
                pass  # a process ended while it was read
            time.sleep(0.5)
        seconds = time.perf_counter() - began
        out.seek(0)
        return out.read(), {**most, "seconds": seconds, "busy": sum(cpu_seconds.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--most", type=float, default=1.0, help="GB of proportional memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slimtune-data-") as folder:
        path = Path(folder) / "rows.jsonl"
        repeated = write_rows(path, given.rows)
        print(f"{given.rows:,} rows, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        command = [sys.executable, "-m", "slimtune", "data", str(path), "--model", given.model, "--json"]
        text, took = run_and_measure(command)
    report = json.loads(text)
    if "error" in report:
        print(report["error"])
        return 1
    found = {f["code"]: f["count"] for f in report["issues"]}
    cores = len(psutil.Process().cpu_affinity())
    print(f"{took['seconds']:.0f} s, {given.rows / took['seconds']:,.0f} rows/s, {report['tokens'] / 1e6:.1f} M tokens")
    peak = f"{took['pss'] / 1e9:.2f} GB (PSS), {took['rss'] / 1e9:.2f} GB (RSS)"
    print(f"{took['processes']:.0f} processes, together at most {peak}")
    print(
        f"busy: {took['busy'] / took['seconds']:.2f} of {cores} cores, {1e6 * took['busy'] / given.rows:.0f} µs a row"
    )
    print(f"verdict: {report['verdict']}, issues: {found}; rows that repeat another: {repeated}")
    print(f"load of the machine over the last 5 minutes: {psutil.getloadavg()[1]:.1f} on {psutil.cpu_count()} cores")
    return int(found != {"duplicate": repeated} or took["pss"] > given.most * 1e9)


if __name__ == "__main__":
    sys.exit(main())
