"""Jane Austen's "Persuasion" as documents, a text file for each chapter: the book for docs/raw_text.md.

Debian's package `r-cran-janeaustenr` holds the novel, which is in the public domain, as R's `data/Rdata.rdb`: one
compressed list of lines after another, written by `serialize`. Every third chapter is held out.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    python examples/persuasion.py --words 500 --out persuasion     # the first 500 words of each chapter
"""

import argparse
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

RDB = "austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def read_objects(data: bytes) -> Iterator[bytes]:
    """Yield the objects of an .rdb file: four bytes of length and a zlib stream each."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def read_lines(data: bytes) -> list[str]:
    """Return the texts of a character vector in R's serialization, version 2 or 3 (R Internals, section 1.8)."""
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:  # the name of the encoding
        at += 4 + struct.unpack_from(">i", data, at)[0]
    _, count = struct.unpack_from(">ii", data, at)
    at += 8
    lines = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, at)
        lines.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return lines


def split_chapters(lines: list[str]) -> list[str]:
    """Return the chapters with their headings; the lines of a paragraph are joined."""
    text = "\n".join(line.rstrip() for line in lines)
    starts = [found.start() for found in re.finditer(r"^Chapter \d+$", text, re.MULTILINE)]
    chapters = (text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True))
    return ["\n\n".join(re.sub(r"\s+", " ", p) for p in re.split(r"\n\s*\n", chapter)) for chapter in chapters]


def shorten(chapter: str, words: int) -> str:
    """Return the paragraphs of a chapter up to the one that reaches so many words."""
    kept: list[str] = []
    for paragraph in chapter.split("\n\n"):
        if sum(len(p.split()) for p in kept) < words:
            kept.append(paragraph)
    return "\n\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rdb", type=Path, default=RDB, help="R's file with the novels")
    parser.add_argument("--words", type=int, default=10**9, help="about how many of each chapter; default: all")
    parser.add_argument("--out", type=Path, default="persuasion", help="folder that gets train/ and test/")
    options = parser.parse_args()
    novels = map(read_lines, read_objects(options.rdb.read_bytes()))
    chapters = split_chapters(next(lines for lines in novels if lines[0] == "Persuasion"))
    for number, chapter in enumerate(chapters, 1):
        folder = options.out / ("train" if number % 3 else "test")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.txt").write_text(shorten(chapter, options.words) + "\n", encoding="utf-8")
    print(f"{options.out}: {len(chapters)} chapters, {len(chapters) // 3} of them in test/")


if __name__ == "__main__":
    main()
