"""Faulty data files: each fault put into real rows, in each format and kind of file that can carry it.

`faulty(folder)` writes them and yields, for each, what a survey has to find: one code, at these lines, and nothing else.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DICTIONARY = Path(__file__).parents[2] / "examples" / "devils-dictionary"
FORMS = ("chat", "instruction", "sharegpt", "prompt-completion", "text", "preference")
KINDS = ("jsonl", "json", "csv", "parquet")
N = 40


@dataclass(frozen=True)
class Talk:
    """One question and its answer."""

    user: str
    answer: str
    system: str | None = None


@dataclass(frozen=True)
class Case:
    """A file, what is to be found in it, and what else that brings with it."""

    name: str
    path: Path
    code: str
    lines: list[int]
    also: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def dictionary(start: int = 0, n: int = N, split: str = "train") -> list[Talk]:
    """Rows of The Devil's Dictionary: real text, no two alike."""
    lines = (DICTIONARY / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[start : start + n]
    return [Talk(*(m["content"] for m in json.loads(line)["messages"])) for line in lines]


def record(form: str, talk: Talk) -> dict[str, Any]:
    """A talk as a row of a format."""
    if form == "chat":
        said = [("system", talk.system), ("user", talk.user), ("assistant", talk.answer)]
        return {"messages": [{"role": r, "content": c} for r, c in said if c is not None]}
    if form == "sharegpt":
        said = [("system", talk.system), ("human", talk.user), ("gpt", talk.answer)]
        return {"conversations": [{"from": r, "value": c} for r, c in said if c is not None]}
    if form == "instruction":
        system = {} if talk.system is None else {"system": talk.system}
        return {"instruction": talk.user, "output": talk.answer, **system}
    if form == "prompt-completion":
        return {"prompt": f"{talk.user}\n", "completion": talk.answer}
    if form == "preference":
        return {"prompt": talk.user, "chosen": talk.answer, "rejected": "I have no opinion on that matter."}
    return {"text": f"{talk.user} {talk.answer}"}


def write(path: Path, records: list[dict[str, Any]]) -> list[int]:
    """Write rows; return where each stands: its line, or the number of the item."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8", "surrogatepass")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        return _write_csv(path, records)
    return list(range(1, len(records) + 1))


def _write_csv(path: Path, records: list[dict[str, Any]]) -> list[int]:
    columns = list(dict.fromkeys(key for r in records for key in r))
    lines, at, text = [], 2, io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(columns)
    for r in records:
        before = text.tell()
        cells = (r.get(c, "") for c in columns)
        rows.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
        lines.append(at)
        at += text.getvalue()[before:].count("\n")
    path.write_bytes(text.getvalue().encode("utf-8"))
    return lines


# --- faults of one row's text: code, what the row becomes, the formats that can carry it


def _answer(change: Callable[[str], str]) -> Callable[[Talk], Talk]:
    return lambda talk: Talk(talk.user, change(talk.answer), talk.system)


def _user(change: Callable[[str], str]) -> Callable[[Talk], Talk]:
    return lambda talk: Talk(change(talk.user), talk.answer, talk.system)


TURNS = ("chat", "instruction", "sharegpt")
ANSWERED = ("chat", "instruction", "sharegpt", "prompt-completion", "preference")
TEXTUAL: list[tuple[str, str, Callable[[Talk], Talk], tuple[str, ...]]] = [
    ("mojibake", "latin", _answer(lambda a: a + " Le café est déjà fermé.".encode().decode("cp1252")), FORMS),
    ("mojibake", "quotes", _answer(lambda a: a + " It’s “done”, he said.".encode().decode("cp1252", "replace")[:12]),
     ("chat", "text")),
    ("mojibake", "cyrillic", _user(lambda u: u + " Привет, как дела?".encode().decode("cp1251", "ignore")), ("chat", "text")),
    ("replacement-character", "", _answer(lambda a: a + " The caf\ufffd is shut."), FORMS),
    ("null-byte", "", _answer(lambda a: a[:9] + "\0" + a[9:]), FORMS),
    ("control-character", "backspace", _answer(lambda a: a + "\x08\x08"), FORMS),
    ("control-character", "c1", _user(lambda u: u + " It\x92s late."), ("chat", "text")),
    ("control-character", "escape", _answer(lambda a: "\x1b[31m" + a + "\x1b[0m"), ("instruction",)),
    ("byte-order-mark", "", _user(lambda u: "\ufeff" + u), FORMS),
    ("html-entity", "amp", _answer(lambda a: a + " So say Smith &amp; Sons."), FORMS),
    ("html-entity", "quote", _answer(lambda a: a + " I don&#39;t know."), ("chat", "sharegpt")),
    ("mixed-script", "", _answer(lambda a: a + " So says Rаsputin."), FORMS),  # a Cyrillic а
    ("placeholder-answer", "dots", _answer(lambda a: "..."), ANSWERED),
    ("placeholder-answer", "nan", _answer(lambda a: "nan"), ("instruction", "prompt-completion")),
    ("placeholder-answer", "removed", _answer(lambda a: "[removed]"), ("chat",)),
    ("control-token-in-text", "end", _answer(lambda a: a + "<|im_end|>"), TURNS),
    ("control-token-in-text", "user", _user(lambda u: u + "<|endoftext|>"), ("chat",)),
    ("already-rendered", "llama 2", _user(lambda u: f"[INST] {u} [/INST]"), FORMS[:5]),
    ("already-rendered", "llama 3",
     _user(lambda u: f"<|start_header_id|>user<|end_header_id|>\n\n{u}<|eot_id|>"), TURNS),
    ("already-rendered", "chatml", _user(lambda u: f"<|im_start|>user\n{u}<|im_end|>\n"), TURNS),
    ("already-rendered", "gemma", _user(lambda u: f"<start_of_turn>user\n{u}<end_of_turn>\n"), TURNS),
    ("already-rendered", "phi", _user(lambda u: f"<|user|>\n{u}<|end|>\n<|assistant|>"), ("chat",)),
    ("already-rendered", "alpaca", _user(lambda u: "Below is an instruction that describes a task. Write a response.\n\n"
                                          f"### Instruction:\n{u}\n\n### Response:"), TURNS),
    ("already-rendered", "vicuna", _user(lambda u: f"USER: {u} ASSISTANT:"), ("chat", "sharegpt")),
    ("too-long", "", _answer(lambda a: " ".join([a] * 99)[:4000]), FORMS),
]  # fmt: skip


def _textual(folder: Path) -> Iterator[Case]:
    turn = itertools.cycle(KINDS)
    for code, about, change, forms in TEXTUAL:
        for form in forms:
            kind = next(turn)
            if kind == "csv" and code == "null-byte":
                kind = "json"  # Python's csv ends a file there in some releases
            talks = dictionary()
            bad = (3, 17, 18)
            for i in bad:
                talks[i] = change(talks[i])
            path = folder / f"{code}-{about.replace(' ', '')}-{form}.{kind}"
            lines = write(path, [record(form, t) for t in talks])
            yield Case(path.name, path, code, [lines[i] for i in bad], options={"max_seq_len": 512})


# --- faults between rows


def _between(folder: Path) -> Iterator[Case]:
    turn = itertools.cycle(KINDS)

    def case(code: str, about: str, form: str, talks: list[Talk], bad: list[int], *also: str, **options: Any) -> Case:
        path = folder / f"{code}-{about}-{form}.{next(turn)}"
        lines = write(path, [record(form, t) for t in talks])
        return Case(path.name, path, code, [lines[i] for i in bad], also, options)

    for form in FORMS:
        talks = dictionary()
        talks[30] = Talk(f"{talks[4].user} ", talks[4].answer)  # white space does not make it another row
        yield case("duplicate", "one", form, talks, [30])
        talks = dictionary()
        talks[9] = long = Talk(talks[9].user, " ".join(t.answer for t in dictionary(100, 3)))
        talks[25] = Talk(long.user, long.answer.replace(" the ", " that ", 1))
        yield case("near-duplicate", "one", form, talks, [25])
        held = folder / f"held-{form}.jsonl"
        write(held, [record(form, t) for t in (*dictionary(0, 20, "validation"), *dictionary(7, 1))])
        yield case("overlap", "one", form, dictionary(), [7], validation=held)
        held = folder / f"nearly-held-{form}.jsonl"
        write(held, [record(form, Talk(long.user, long.answer.replace(" a ", " one ", 1)))])
        talks = dictionary()
        talks[12] = long
        yield case("near-overlap", "one", form, talks, [12], validation=held)
    for form in ANSWERED:
        talks = dictionary()
        talks[5], talks[21] = (Talk("Is the sea salty?", answer) for answer in ("Yes.", "No."))
        yield case("contradiction", "yes and no", form, talks, [21])
        talks = dictionary()
        for i in range(10, 22):
            talks[i] = Talk(talks[i].user, "I am sorry, but I cannot help you with that request.")
        yield case("same-answer", "rote", form, talks, list(range(10, 22)))
    talks = dictionary()
    talks[11] = Talk(talks[11].user, "I have no opinion on that matter.")
    yield case("same-pair", "one", "preference", talks, [11])
    for form in TURNS:
        talks = dictionary()
        talks[14] = Talk(" ".join(t.answer for t in dictionary(50, 30)), "A long story.")
        yield case("no-supervised-token", "cut", form, talks, [14], "too-long", max_seq_len=512, on_overlong="truncate")


# --- faults of the file and of its records: what is read, not what is said


def _broken(folder: Path) -> Iterator[Case]:
    def lines_of(form: str) -> list[str]:
        return [json.dumps(record(form, t)) for t in dictionary()]

    def jsonl(code: str, form: str, bad: str | bytes, about: str = "") -> Case:
        path = folder / f"{code}-{about}-{form}.jsonl"
        lines = [line.encode() for line in lines_of(form)]
        lines[6] = bad.encode() if isinstance(bad, str) else bad
        path.write_bytes(b"\n".join(lines) + b"\n")
        return Case(path.name, path, code, [7])

    for form in FORMS:
        good = record(form, dictionary()[6])
        column = next(k for k in good if k != "prompt")
        yield jsonl("bad-json", form, json.dumps(good)[:-9])
        yield jsonl("not-utf8", form, json.dumps(good).encode().replace(b"Define", b"D\xe9fine"))
        yield jsonl("not-an-object", form, json.dumps([good]))
        yield jsonl("missing-column", form, json.dumps({k + "s" * (k == column): v for k, v in good.items()}))
        yield jsonl("wrong-type", form, json.dumps({**good, column: 7}))
        if form not in ("chat", "sharegpt"):
            yield jsonl("empty-content", form, json.dumps({**good, column: " \n"}))
            yield jsonl("half-character", form, json.dumps({**good, column: "a \ud83d"}))
    yield jsonl("empty-content", "chat", json.dumps(record("chat", Talk("Why?", ""))))
    yield jsonl("half-character", "chat", json.dumps(record("chat", Talk("Why?", "So \udc00"))))
    yield jsonl("unknown-role", "chat", json.dumps(record("chat", Talk("a", "b"))).replace('"user"', '"usr"'))
    yield jsonl("unknown-role", "sharegpt", json.dumps(record("sharegpt", Talk("a", "b"))).replace("human", "hooman"))
    yield jsonl("no-assistant-turn", "chat", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    yield jsonl("no-assistant-turn", "sharegpt", json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}))
    yield jsonl("missing-key", "chat", json.dumps({"messages": [{"role": "user"}]}))
    yield jsonl("unknown-key", "chat", json.dumps({"messages": [{"role": "user", "content": "a", "txt": "b"}]}))
    silent = record("chat", Talk("Hi", "Yes"))
    silent["messages"][1]["weight"] = 0
    yield jsonl("nothing-to-learn", "chat", json.dumps(silent))
    for form in ("instruction", "prompt-completion", "text", "chat"):
        path = folder / f"bad-csv-{form}.csv"
        lines = write(path, [record(form, t) for t in dictionary()])
        text = path.read_text(encoding="utf-8").split("\n")
        text[lines[8] - 2] += ",more"  # the last line of the eighth row
        path.write_text("\n".join(text), encoding="utf-8")
        yield Case(path.name, path, "bad-csv", [lines[7]])
    path = folder / "bad-json-cut.json"
    write(path, [record("chat", t) for t in dictionary()])
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    yield Case(path.name, path, "bad-json", [N])


def faulty(folder: Path) -> list[Case]:
    """Write every faulty file for a ChatML base; return what is to be found in each."""
    return [*_textual(folder), *_between(folder), *_broken(folder)]
