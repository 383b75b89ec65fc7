"""Three small data sets of different kinds, from this repository and two Debian packages.

    devil        examples/devils-dictionary: short questions and answers in one tone
    jargon       the Jargon File (public domain): longer definitions of hackers' words
    persuasion   Jane Austen's novel (public domain): raw text

    apt-get download dict-jargon r-cran-janeaustenr && for p in *.deb; do dpkg-deb -x $p texts; done
    python benchmarks/make_data_sets.py --texts texts --out SETS

SETS/NAME/data.json is the `data` section of a recipe, with absolute paths.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS_PER_FILE = 16
"""Rows of 128 tokens in a file of the set `persuasion`, about."""
MOST_TEST_ROWS = 400
JARGON, AUSTEN = "usr/share/dictd/jargon.dict.dz", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def read_jargon(text: str) -> list[tuple[str, str]]:
    """Return words and the first paragraph of their definitions of 80 to 900 characters."""
    found = []
    for entry in re.split(r"\n(?=\S)", text):
        head, _, body = entry.partition("\n")
        paragraph = re.split(r"\n\s*\n", body.partition("\n    ")[2])[0]
        answer = re.sub(r"[{}]", "", " ".join(paragraph.split()))
        if 80 <= len(answer) <= 900 and 2 <= len(head) <= 40 and not head.startswith("00-"):
            found.append((head.strip(), answer))
    return found


def write_jargon(file: Path, folder: Path) -> dict[str, str]:
    """Write chat rows; a hash of the word decides which are held out."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word, answer in read_jargon(gzip.decompress(file.read_bytes()).decode()):
        part = hashlib.sha256(word.encode()).digest()[0]
        messages = [{"role": "user", "content": f"What do hackers mean by {word}?"}]
        row = json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]}, ensure_ascii=False)
        splits["test" if part < 26 else "validation" if part < 39 else "train"].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {name: f"{folder}/{name}.jsonl" for name in splits}


def take_rows(data: dict[str, Any], rows: int, folder: Path) -> dict[str, Any]:
    """Return a `data` section of which the first rows alone train, written to `folder`.

    The others are test rows, too, of which there are at most 400. Of raw text the first files train, with about as many
    rows of 128 tokens.
    """
    train, test = (Path(data[name]) for name in ("train", "test"))
    if train.is_file():
        lines, held_out = (file.read_text(encoding="utf-8").splitlines() for file in (train, test))
        for name, some in (("train", lines[:rows]), ("test", (held_out + lines[rows:])[:MOST_TEST_ROWS])):
            (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
        return {**data, "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    files, count = sorted(train.iterdir()), rows // ROWS_PER_FILE
    for name, copied in (("train", files[:count]), ("test", [*test.iterdir(), *files[count:]])):
        (folder / name).mkdir()
        for file in copied:
            shutil.copy(file, folder / name)
    return {**data, "train": str(folder / "train"), "test": str(folder / "test")}


def main() -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="the packages, unpacked")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.absolute()
    devil = ROOT / "examples/devils-dictionary"
    sets = {"devil": {name: f"{devil}/{name}.jsonl" for name in ("train", "validation", "test")}}
    sets["jargon"] = write_jargon(args.texts / JARGON, out / "jargon")
    folder = out / "persuasion"
    script = [sys.executable, str(ROOT / "examples/persuasion.py"), "--words", "1500"]
    command = [*script, "--rdb", str(args.texts / AUSTEN), "--out"]
    subprocess.run([*command, str(folder)], check=True)
    held_out = sorted((folder / "test").glob("*.txt"))
    (folder / "validation").mkdir(exist_ok=True)
    for file in held_out[: len(held_out) // 2]:
        file.rename(folder / "validation" / file.name)
    sets["persuasion"] = {name: f"{folder}/{name}" for name in ("train", "validation", "test")}
    sets["persuasion"] |= {"format": "document", "max_seq_len": 128}
    for name, data in sets.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "data.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
