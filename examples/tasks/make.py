"""Held-out rows as multiple choice: the definition of the word among three of other words, in a drawn order."""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    lines = (HERE.parent / "devils-dictionary" / "test.jsonl").read_text().splitlines()
    pairs = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    draw = random.Random(0)
    rows = []
    for question, answer in pairs:
        choices = [answer, *draw.sample([other for _, other in pairs if other != answer], 3)]
        draw.shuffle(choices)
        rows.append({"question": question, "choices": choices, "answer": choices.index(answer)})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "devils-dictionary.jsonl").write_text(text)
    print(f"{len(rows)} questions, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
