"""Preference pairs from two dictionaries: Ambrose Bierce's definition of a word is chosen, WordNet's is rejected.

Debian's package `wordnet-base` holds WordNet 3.0 (Princeton University; free for any purpose with its notice). The
chosen answers are those of `devils-dictionary/` beside this file, and a word keeps its split of there: held out are the
words of its validation and test rows.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python examples/preferences.py --out pairs
    slimtune train examples/devils-dictionary.yaml                       # the answers first: `make demo` does the same
    slimtune train --model smollm2-135m --data pairs/train.jsonl --task dpo --init-adapter runs/devils-dictionary \
        --epochs 1 --lr 4e-5 --out runs/preferred
    slimtune eval runs/preferred --data pairs/test.jsonl

Nothing but the definitions themselves may tell which is which. So both answers are one sentence that begins with a
capital and ends with a full stop, neither is more than twice as long as the other, and in each file the chosen answer
is the longer one as often as the shorter one.
"""

import argparse
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
WORDNET = Path("wordnet/usr/share/wordnet")
SPLITS = {"train": ("train",), "test": ("validation", "test")}


def read_glosses(folder: Path) -> dict[str, str]:
    """Return WordNet's definition of each word in its first sense, of the noun if there is one (wndb(5WN))."""
    found: dict[str, str] = {}
    for part in ("noun", "verb", "adj", "adv"):
        lines = (folder / f"data.{part}").read_text().splitlines()
        glosses = {line[:8]: line.partition(" | ")[2].strip() for line in lines if not line.startswith("  ")}
        for line in (folder / f"index.{part}").read_text().splitlines():
            if not line.startswith("  "):
                word, _, senses, *rest = line.split()
                found.setdefault(word.replace("_", " "), glosses[rest[-int(senses)]])
    return found


def make_sentence(gloss: str) -> str:
    """Return a gloss without its examples and its field, `(law) …; "he …"`, as a sentence."""
    text = re.sub(r"^(\([^)]*\) )+", "", re.sub(r'[;:]? ?".*$', "", gloss)).strip(" ;")
    return f"{text[:1].upper()}{text[1:]}."


def make_pairs(rows: list[dict], glosses: dict[str, str]) -> list[dict]:
    """Return the pairs of those words that both dictionaries define in about as many letters, balanced by length."""
    longer: list[dict] = []
    shorter: list[dict] = []
    for row in rows:
        prompt, answer = row["messages"]
        word = re.findall('"(.*)"', prompt["content"])[0]
        chosen = re.split(r'(?<=[.!?])(?<!Mr\.)(?<!Dr\.)(?<!St\.) (?=[A-Z"])', answer["content"])[0]
        rejected = make_sentence(glosses.get(word.lower(), ""))
        if chosen.endswith(".") and 0.5 <= len(chosen) / len(rejected) <= 2:
            answers = {
                k: [{"role": "assistant", "content": v}] for k, v in (("chosen", chosen), ("rejected", rejected))
            }
            (longer if len(chosen) > len(rejected) else shorter).append({"prompt": [prompt], **answers})
    count = min(len(longer), len(shorter))
    draw = random.Random(0)
    pairs = draw.sample(longer, count) + draw.sample(shorter, count)
    draw.shuffle(pairs)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with WordNet's data.noun")
    parser.add_argument("--out", type=Path, default="pairs", help="folder for train.jsonl and test.jsonl")
    options = parser.parse_args()
    glosses = read_glosses(options.wordnet)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, parts in SPLITS.items():
        files = [HERE / f"devils-dictionary/{part}.jsonl" for part in parts]
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        pairs = make_pairs(rows, glosses)
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.out / name}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
