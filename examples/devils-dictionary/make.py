"""The Devil's Dictionary as chat rows: one entry, one question, one short answer.

Debian's package `dict-devil` holds Ambrose Bierce's text as a plain gzip file. An entry begins flush left, after an
empty line, with its headword in capitals; a paragraph of prose is flush left or has its first line indented; verse,
quotations and their signatures are indented on every line. Only the prose before the first quotation is kept, so an
answer is the definition itself. The split hangs on a hash of the headword alone: it stays when entries come or go.

    python make.py [--dict /usr/share/dictd/devil.dict.dz] [--out FOLDER]
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
DICT = Path("/usr/share/dictd/devil.dict.dz")
LONGEST = 950  # characters of an answer: about 240 tokens

PART = r"(?:n|adj|adv|v|pron?|x|p|pp|conj|prep|interj)\.(?: ?(?:t|i|pl|p|a|s)\.)*(?: and [a-z.]+)?"
HEAD = re.compile(
    r"(?P<head>[A-Z][A-Z'.-]*(?: \(?or \(?[A-Z]+\)?)?(?:,? [A-Z][A-Z'.-]+)*\??)"
    rf"(?P<rest>(?:,? ?{PART})?(?:[.,]? |\.?$).*)"
)
# The dictionary prints every headword in capitals: which of them keep one is not in the file.
PROPER = """
    Allah|Australia|Avernus|Baal|Bacchus|Benedictines|Berenice's hair|Brahma|Caaba|Calumnus|Carmelite|Cartesian
    |Cerberus|Christian|Clio|Cremona|Cupid|Decalogue|Druids|Elysium|Eucharist|Freemasons|Gnostics|Gorgon|Graces|Hades
    |Harmonists|I|Infralapsarian|J|K|Koran|Laocoon|Leviathan|LL.D.|Magdalene|Malthusian|Mammon|Manes|Manicheism
    |Monday|Newtonian|Nirvana|November|Occident|Olympian|Philistine|Platonic|Populist|Portuguese|Pre-Adamite
    |Presbyterian|R.I.P.|Roundhead|Russian|Sabbath|Satan|Scriptures|T|Trinity|un-American|Unitarian|Universalist|W
    |Wall Street|Washingtonian|X|Yankee|Zanzibari|Zeus|April fool|King's evil|Jews-harp
"""
# The author's joke in these is a slur on people for their birth: not a tone to teach a model.
LEFT_OUT = {"AFRICAN", "HEBREW", "MINSTREL", "MULATTO", "NEGRO", "PICKANINNY", "RED-SKIN"}
CASED = {name.strip().upper(): name.strip() for name in PROPER.split("|")}


def entries(text: str) -> list[tuple[str, list[str]]]:
    """Return `(headword, blocks)`: a block is the text between two empty lines, its first line without the headword."""
    body = text[text.index("\nABASEMENT, n.") : text.rindex("\n abcdefghijklmnopqrstuvwxyz")]
    found: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n\s*\n", body.strip("\n")):
        head = HEAD.match(block) if not block.startswith(" ") else None
        if head is None:
            found[-1][1].append(block)
            continue
        word = head["head"].rstrip(".,?") if head["head"].count(".") < 2 else head["head"]
        first = head["rest"] + block[head.end() :]
        if len(word) == 1:  # "I is the first letter of the alphabet": the headword is part of its sentence
            first = block
        found.append((word, [first]))
    return found


def prose(blocks: list[str]) -> list[str]:
    """Return the paragraphs of prose before the first quotation, each as one line."""
    kept: list[str] = []
    for block in blocks:
        lines = block.split("\n")
        if block is not blocks[0] and all(line.startswith(" ") for line in lines[:2]):
            return _finished(kept)
        for i, line in enumerate(lines):
            if line.startswith(" " * 20):  # a signature
                break
            if i == 0 or line.startswith("    "):
                kept.append(line)
            else:
                kept[-1] += "\n" + line
    return [_clean(p) for p in kept]


def _finished(paragraphs: list[str]) -> list[str]:
    """Drop the words that only lead into the quotation which follows: `…, as the poet says:`."""
    kept = [_clean(p) for p in paragraphs]
    if kept and not kept[-1].endswith((".", "!", "?", '."', '!"', '?"', ".)", ".]")):
        kept[-1] = " ".join(_sentences(kept[-1])[:-1])
    return kept


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Dr\.)(?<!St\.)(?<!Mrs\.) (?=[A-Z\"_])", paragraph)


def _clean(paragraph: str) -> str:
    text = re.sub(r"(?<=[A-Za-z])-\n(?=[A-Za-z])", "-", paragraph)  # a word that was broken at its own hyphen
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(rf"^[.,]? ?(?:{PART})?(?: |$)", "", text).strip()
    text = re.sub(r"^\[[^\]]*\] ?", "", text)  # where the word comes from
    text = re.sub(r" ?\(See [^)]*\)", "", text)
    text = text.replace("[sic] ", "").replace("_", "").replace("n ancient Rome, a", "In ancient Rome, a")
    return re.sub(r"\{([^}]*)\}", lambda m: m[1].lower(), text)


def answer(paragraphs: list[str]) -> str:
    """Return whole paragraphs up to `LONGEST` characters; of a first one that is longer, whole sentences."""
    kept: list[str] = []
    for pieces in (paragraphs, _sentences(paragraphs[0]) if paragraphs else []):
        room = LONGEST
        for piece in pieces:
            room -= len(piece) + 1
            if room < 0:
                break
            kept.append(piece)
        if kept:
            break
    return " ".join(piece for piece in kept if piece)


def split_of(word: str) -> str:
    """Return the split a headword belongs to: about 80, 10 and 10 of a hundred."""
    share = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(share, "train")


def rows(text: str) -> dict[str, list[dict]]:
    """Return the chat rows of each split, in the order of the dictionary."""
    made: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    seen: set[tuple[str, str]] = set()
    for head, blocks in entries(text):
        word, said = CASED.get(head, head.lower()), answer(prose(blocks))
        if not said or head in LEFT_OUT or (word, said) in seen:
            continue
        seen.add((word, said))
        ask = {"role": "user", "content": f'Define "{word}".'}
        made[split_of(word)].append({"messages": [ask, {"role": "assistant", "content": said}]})
    return made


def main() -> int:
    """Write the three files; return the exit code."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--dict", type=Path, default=DICT, help="devil.dict.dz of Debian's package dict-devil")
    ask.add_argument("--out", type=Path, default=HERE, help="folder for train.jsonl, validation.jsonl, test.jsonl")
    given = ask.parse_args()
    if not given.dict.is_file():
        print(f"{given.dict} is not there\n  hint: apt-get install dict-devil, or give --dict PATH", file=sys.stderr)
        return 2
    with gzip.open(given.dict, "rt", encoding="utf-8") as file:
        made = rows(file.read())
    given.out.mkdir(parents=True, exist_ok=True)
    for split, some in made.items():
        path = given.out / f"{split}.jsonl"
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")
        os.replace(part, path)
        print(f"{path}: {len(some)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
