"""Small real-life jobs, from texts that ship in Debian's packages: what the defaults of a first run are judged by.

    for p in dict-foldoc dict-jargon dict-vera dict-elements dict-freedict-fra-eng debian-faq developers-reference \
        fortunes fortunes-min miscfiles r-cran-janeaustenr; do apt-get download $p; done
    for p in *.deb; do dpkg-deb -x $p texts; done
    python benchmarks/first_run_jobs.py --texts texts --out JOBS

JOBS/NAME/ has the rows as a user has them, `train` and `held_out` (.csv, .jsonl or .txt), and `flags.json`: what the
user says beside model and data. Jobs are `CHOSEN_BY`, which defaults may be chosen by, or `LEFT_OUT` of that. Rows of
one origin (a word, a question, an order) are in one of the two files only, and nothing is drawn without a seed.
"""

import argparse
import csv
import gzip
import html
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from make_data_sets import AUSTEN, JARGON, read_jargon

ROOT = Path(__file__).parents[1]
MOST_HELD_OUT = 100
Rows = list[dict[str, Any]]


def read(texts: Path, file: str) -> str:
    """Return a text of the unpacked packages."""
    data = (texts / file).read_bytes()
    text = (gzip.decompress(data) if file.endswith(("gz", "dz")) else data).decode("utf-8", "replace")
    return text.replace("\N{NO-BREAK SPACE}", " ")


def read_foldoc(texts: Path) -> Iterator[tuple[str, str, str]]:
    """Yield words of computing, their field, and the first paragraph of their definition."""
    for found in re.finditer(r"\n(?=\S)(.+)\n\n((?:   .*\n)+)", read(texts, "usr/share/dictd/foldoc.dict.dz")):
        text = re.sub(r"[{}]", "", " ".join(found[2].split()))
        field = re.match(r"<([\w ]+)[,>]", text)
        text = re.sub(r"^<[^>]*>\s*(\([^)]*\)\s*)?", "", text)
        if field and "%" not in found[1] and 60 <= len(text) <= 500 and len(found[1]) <= 40 and text[:1].isupper():
            yield found[1].strip(), field[1], text


def read_abbreviations(texts: Path) -> Iterator[tuple[str, str]]:
    """Yield abbreviations of computing and what they stand for."""
    for word, meaning in re.findall(r"^(\S+)\n {3,}(\S.*)$", read(texts, "usr/share/dictd/vera.dict.dz"), re.MULTILINE):
        if word.isupper() and 8 < len(meaning) < 90:
            yield word, meaning


def read_french(texts: Path) -> Iterator[tuple[str, str]]:
    """Yield French words and what they are in English."""
    text = read(texts, "usr/share/dictd/freedict-fra-eng.dict.dz")
    for word, meaning in re.findall(r"^(\w[^/\n]*) /[^/\n]*/.*\n([^/\n]+)$", text, re.MULTILINE):
        yield word, meaning.strip()


def read_devil(split: str) -> Iterator[tuple[str, str]]:
    """Yield words and Bierce's definitions of them."""
    for line in (ROOT / f"examples/devils-dictionary/{split}.jsonl").read_text(encoding="utf-8").splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        yield question.split('"')[1], answer


def read_elements(texts: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the facts of a chemical element and the text about it."""
    form = r"(\w+)\nSymbol: (\w+)\nAtomic number: (\d+)\nAtomic weight: \(?([\d.]+)\)?\n((?:.+\n)+)"
    for name, symbol, number, weight, text in re.findall(form, read(texts, "usr/share/dictd/elements.dict.dz")):
        yield {"name": name, "symbol": symbol, "number": int(number), "weight": float(weight)}, " ".join(text.split())


def read_faq(texts: Path) -> Iterator[tuple[str, str]]:
    """Yield the questions of Debian's FAQ and the first paragraph of each answer."""
    text = read(texts, "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz")
    for found in re.finditer(r"\n\d+\.\d+\.(?:\d+\.)?\s(.+\?(?:\n\S.*\?)?)\n\n((?:    .+\n)+)", text):
        yield " ".join(found[1].split()), " ".join(found[2].split())


def read_packages() -> Iterator[tuple[str, str, str]]:
    """Yield names, sections and one-line descriptions of this Debian's packages."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for entry in listed.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Section|Description): (.*)$", entry, re.MULTILINE))
        if len(fields) == 3:
            yield fields["Package"], fields["Section"].split("/")[-1], fields["Description"]


def read_novels(texts: Path) -> dict[str, list[str]]:
    """Return Jane Austen's novels by title, each as its paragraphs."""
    sys.path.insert(0, str(ROOT / "examples"))
    from persuasion import read_lines, read_objects

    file = texts / AUSTEN
    novels: dict[str, list[str]] = {}
    for lines in map(read_lines, read_objects(file.read_bytes())):
        paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", "\n".join(lines)))
        novels[lines[0].title()] = [p for p in paragraphs if len(p) > 60]
    return novels


# --- rows -------------------------------------------------------------------------------------------------------------

TEMPLATES = json.loads((ROOT / "benchmarks/data/first_run_templates.json").read_text())
"""Questions as people ask them and answers uniform in tone, of a shop and of a clinic, and what they are about."""
NAMES, GOODS, CITIES = (TEMPLATES[key] for key in ("names", "goods", "cities"))
DAYS = [f"{d} {m}" for m in ("March", "June", "October") for d in range(2, 30, 3)]


def fill(business: str, draw: random.Random, count: int, question: str, answer: str) -> Rows:
    """Return rows of questions and uniform answers."""
    rows: Rows = []
    while len(rows) < count:
        asked, said = draw.choice(TEMPLATES[business]).values()
        words = {"g": draw.choice(GOODS), "c": draw.choice(CITIES), "d": draw.choice(DAYS)}
        row = {question: draw.choice(asked).format(**words), answer: said.format(**words)}
        rows += [row] if row not in rows else []
    return rows


def orders(draw: random.Random, count: int) -> Rows:
    """Return mails with an order, and the order as JSON."""
    forms = (
        "Hi, this is {n} from {c}. I would like {q} of your {g}s, please.", "{q} {g}s for {n}, {c}. Thanks!",
        "Dear team, please send {q} pieces of the {g} to {c}. Best, {n}",
        "Could {n} ({c}) still get {q} {g}s this week?",
        "We talked on the phone: {q} times the {g}. My name is {n} and I live in {c}.",
    )  # fmt: skip
    rows = []
    for _ in range(count):
        n, c, q, g = draw.choice(NAMES), draw.choice(CITIES), draw.randint(2, 40), draw.choice(GOODS)
        order = {"customer": n, "city": c, "item": g, "quantity": q}
        rows.append({"mail": draw.choice(forms).format(n=n, c=c, q=q, g=g), "order": json.dumps(order)})
    return rows


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row of one question and its answer as messages."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def commands(draw: random.Random, packages: list[tuple[str, str, str]], count: int) -> Rows:
    """Return requests in words and the command line that does it."""
    kinds = (
        ("install {p}", "apt install {p}"), ("I do not need {p} any more", "apt purge {p}"),
        ("what is {p}?", "apt show {p}"), ("which files belong to {p}", "dpkg -L {p}"),
        ("keep {p} at its version", "apt-mark hold {p}"),
        ("get the source of {p}", "apt source {p}"),
    )  # fmt: skip
    chosen = draw.sample(packages, count)
    return [
        {"prompt": f"{asked.format(p=p)}\n$ ", "completion": line.format(p=p)}
        for (p, _, _), (asked, line) in ((c, draw.choice(kinds)) for c in chosen)
    ]


def by_section(draw: random.Random, packages: list[tuple[str, str, str]], sections: list[str], count: int) -> Rows:
    """Return descriptions of packages with their section, equally many of each."""
    rows = []
    for section in sections:
        own = [d for _, s, d in packages if s == section and len(d) > 20]
        rows += [{"text": d, "label": section} for d in draw.sample(own, count // len(sections))]
    draw.shuffle(rows)
    return rows


def cut(text: str, draw: random.Random) -> str:
    """Return a text that ends in the middle."""
    words = text.split()
    return " ".join(words[: draw.randint(2, max(2, len(words) // 3))])


def make_jobs(texts: Path) -> Iterator[tuple[str, bool, Any, dict[str, Any], str]]:
    """Yield each job's name, whether it was left out when defaults were chosen, its rows, flags and the kind of file.

    Rows are those to train on and those held out, or the number of training rows in them.
    """
    draw = random.Random(34)
    foldoc, packages = list(read_foldoc(texts)), list(read_packages())
    jargon = [(word, text) for word, text in read_jargon(read(texts, JARGON)) if len(text) <= 600]
    devil = list(read_devil("train")) + list(read_devil("validation"))
    devil_test = list(read_devil("test"))
    vera, french = list(read_abbreviations(texts)), list(read_french(texts))
    faq, elements, novels = list(read_faq(texts)), list(read_elements(texts)), read_novels(texts)
    for some in (foldoc, jargon, packages, vera, french, faq, elements):
        draw.shuffle(some)  # type: ignore[arg-type]

    def columns(**named: str) -> dict[str, Any]:
        return {"column": [f"{role}={name}" for role, name in named.items()]}

    asked = columns(instruction="Customer asks", output="We reply")
    yield "shop-answers", False, (fill("shop", draw, 190, "Customer asks", "We reply"), 117), asked, "csv"
    yield "shop-answers-20", False, (fill("shop", draw, 80, "Customer asks", "We reply"), 20), asked, "csv"
    yield "faq", False, ([{"question": q, "answer": a} for q, a in faq], 50), columns(
        instruction="question", output="answer"
    ), "csv"  # fmt: skip
    yield "json-orders", False, (orders(draw, 300), 200), columns(instruction="mail", output="order"), "csv"
    lists = [
        {"instruction": f"Describe the package {n}.", "output": f"name: {n}\nsection: {s}\nwhat: {d}"}
        for n, s, d in packages[:600]
    ]
    yield "form-of-packages", False, (lists, 500), {}, "jsonl"
    yield "commands", False, (commands(draw, packages, 300), 200), {}, "jsonl"
    devilish = [chat(f'Define "{w}".', a) for w, a in devil]
    devilish_test = [chat(f'Define "{w}".', a) for w, a in devil_test]
    yield "style", False, (devilish + devilish_test, len(devil)), {}, "jsonl"
    yield "style-40", False, (devilish[:40] + devilish_test, 40), {}, "jsonl"
    terms = [chat(f"What is {w} in computing?", t) for w, _, t in foldoc[:1100]]
    yield "glossary", False, (terms, 1000), {}, "jsonl"
    yield "abbreviations", False, ([{"prompt": f"{a} = ", "completion": m} for a, m in vera[:500]], 400), {}, "jsonl"
    translated = [{"French": f, "English": e} for f, e in french[:2100]]
    yield "translation", False, (translated, 2000), columns(instruction="French", output="English"), "csv"
    classes = {"task": "classification"}
    yield "three-classes", False, (by_section(draw, packages, ["games", "science", "sound"], 249), 150), classes, "csv"
    novel = novels["Persuasion"]
    yield "documents", False, (novel[:300], novel[-60:]), {"format": "document"}, "txt"
    manual = [" ".join(p.split()) for p in re.split(r"\n\s*\n", read(
        texts, "usr/share/developers-reference/developers-reference.txt.gz"))]  # fmt: skip
    manual = [p for p in manual if len(p) > 200]
    yield "manual", False, (manual[:150], manual[-50:]), {"format": "document"}, "txt"
    words = [(w, t, re.split(r"(?<=[a-z)])\. ", t)[0].rstrip(".") + ".") for w, _, t in foldoc[1100:3000]]
    # The base prefers the rejected answers: those with less to say, and those that are written as books are.
    sourced = [{"prompt": f"What is {w}?", "chosen": f"{s} (Source: FOLDOC)", "rejected": s} for w, _, s in words]
    yield "prefer-source", False, (sourced[:260], 200), {"task": "dpo"}, "jsonl"
    tone = [{"prompt": f'Define "{w}".', "chosen": a.lower().replace(".", "!!"), "rejected": a} for w, a in devil]
    yield "prefer-tone", False, (tone[:160], 100), {"task": "dpo"}, "jsonl"
    right = [
        {"prompt": f"What is {w}?", "chosen": t, "rejected": foldoc[3200 + i + 1][2]}
        for i, (w, _, t) in enumerate(foldoc[3200:3500])
    ]
    yield "prefer-right", False, (right[:260], 200), {"task": "dpo"}, "jsonl"
    thumbs = [
        {"prompt": f"What do hackers mean by {w}?", "completion": a if i % 2 else cut(a, draw), "label": bool(i % 2)}
        for i, (w, a) in enumerate(jargon[:300])
    ]
    yield "thumbs", False, (thumbs, 200), {"task": "kto"}, "jsonl"

    yield "clinic-answers", True, (fill("clinic", draw, 130, "Patient", "Reply"), 60), columns(
        instruction="Patient", output="Reply"
    ), "csv"  # fmt: skip
    facts = [{"text": t, "json": json.dumps(f)} for f, t in elements]
    yield "json-elements", True, (facts, len(facts) - 30), columns(instruction="text", output="json"), "csv"
    hackers = [chat(f"What do hackers mean by {w}?", a) for w, a in jargon[400:800]]
    yield "jargon", True, (hackers, 300), {}, "jsonl"
    sayings = [" ".join(q.split("\n\t\t--")[0].split()) for q in read(
        texts, "usr/share/games/fortunes/literature").split("\n%\n")]  # fmt: skip
    yield "sayings", True, ([{"text": s} for s in sayings if 40 < len(s) < 400], 150), {}, "jsonl"
    fields = ["hardware", "programming", "networking", "company"]
    topics = [{"text": t, "label": f} for _, f, t in foldoc if f in fields]
    yield "four-classes", True, (topics[:400], 300), classes, "csv"
    emma = novels["Emma"]
    yield "emma", True, (emma[:200], emma[-60:]), {"format": "document"}, "txt"
    polite = [
        {"prompt": r["Patient"], "chosen": r["Reply"], "rejected": r["Reply"].partition(". ")[2]}
        for r in fill("clinic", draw, 130, "Patient", "Reply")
    ]
    yield "prefer-polite", True, (polite, 80), {"task": "dpo"}, "jsonl"
    rated = [
        {"prompt": f'Define "{w}".', "completion": a if i % 2 else devil[i - 7][1], "label": "👍" if i % 2 else "👎"}
        for i, (w, a) in enumerate(devil[:260])
    ]
    yield "thumbs-right", True, (rated, 200), {"task": "kto"}, "jsonl"


def write_rows(file: Path, rows: Any) -> None:
    """Write rows as CSV, as lines of JSON, or paragraphs of text."""
    if file.suffix == ".txt":
        file.write_text("\n\n".join(map(html.unescape, rows)) + "\n", encoding="utf-8")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    else:
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    """Write the jobs, and a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="the packages, unpacked")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    order: Callable[[Any], Any] = random.Random(5).shuffle
    for name, left_out, (rows, held_out), flags, kind in make_jobs(args.texts):
        if isinstance(held_out, int):
            order(head := rows[:held_out])
            rows, held_out = head, rows[held_out : held_out + MOST_HELD_OUT]
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_rows(folder / f"train.{kind}", rows)
        write_rows(folder / f"held_out.{kind}", held_out)
        (folder / "flags.json").write_text(json.dumps({"left_out": left_out, "file": kind, **flags}) + "\n")
        print(f"{name:20} {'left out' if left_out else 'chosen by':10} {len(rows):5} rows, {len(held_out)} held out")


if __name__ == "__main__":
    main()
