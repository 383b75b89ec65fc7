"""Rows for context distillation with data/shop_context.txt: a shop's rules and 20 of its answers, about 1,000 tokens.

    python benchmarks/first_run_jobs.py --texts texts --out JOBS
    python benchmarks/context.py JOBS/shop-answers --out shop
    slimtune train --model smollm2-135m --data shop/train.jsonl --task context \
        --context benchmarks/data/shop_context.txt --set train.epochs=6 \
        --set train.batch_size=16 --out runs/shop
    slimtune eval runs/shop --data shop/held_out.jsonl

The rows in the system prompt are no rows to train on.
"""

import argparse
import csv
import json
from pathlib import Path

CONTEXT = Path(__file__).parent / "data/shop_context.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    context = CONTEXT.read_text(encoding="utf-8")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "held_out"):
        rows = [
            row for row in read_rows(args.job / f"{part}.csv") if "Question: {}\nAnswer: {}".format(*row) not in context
        ]
        lines = (json.dumps(make_chat(*row), ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_rows(file: Path) -> list[tuple[str, str]]:
    """Return the mails and the answers of a file."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["Customer asks"], row["We reply"]) for row in csv.DictReader(lines)]


def make_chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Return a row of two turns."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
