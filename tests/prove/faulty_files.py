"""Faulty data files: each fault in real rows, in each format and kind of file that can have it."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DICTIONARY = Path(__file__).parents[2] / "examples" / "devils-dictionary"
FORMATS = ("chat", "instruction", "sharegpt", "prompt-completion", "text", "preference")
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
    """A file, the issue that the report has to find at these lines, and the codes of issues that come with it."""

    path: Path
    code: str
    lines: list[int]
    also: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def read_dictionary(start: int = 0, n: int = N, split: str = "train") -> list[Talk]:
    """Return rows of The Devil's Dictionary: real text, no two alike."""
    lines = (DICTIONARY / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[start : start + n]
    return [Talk(*(m["content"] for m in json.loads(line)["messages"])) for line in lines]


def make_record(format: str, talk: Talk) -> dict[str, Any]:
    """Return a talk as a row of a format."""
    system = {} if talk.system is None else {"system": talk.system}
    turns = {**system, "user": talk.user, "assistant": talk.answer}
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    return {
        "chat": {"messages": [{"role": role, "content": text} for role, text in turns.items()]},
        "sharegpt": {"conversations": [{"from": speakers[role], "value": text} for role, text in turns.items()]},
        "instruction": {"instruction": talk.user, "output": talk.answer, **system},
        "prompt-completion": {"prompt": f"{talk.user}\n", "completion": talk.answer},
        "preference": {"prompt": talk.user, "chosen": talk.answer, "rejected": "I have no opinion on that matter."},
        "text": {"text": f"{talk.user} {talk.answer}"},
    }[format]


def write(path: Path, records: list[dict[str, Any]]) -> list[int]:
    """Write rows; return the line, or the number of the item, of each."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8", "surrogatepass")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        columns = list(dict.fromkeys(key for r in records for key in r))
        text, lines = io.StringIO(), []
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        for r in records:
            lines.append(text.getvalue().count("\n") + 1)
            rows.writerow([c if isinstance(c := r.get(name, ""), str) else json.dumps(c) for name in columns])
        path.write_bytes(text.getvalue().encode())
        return lines
    return list(range(1, len(records) + 1))


Change = Callable[[Talk], Talk]


def _answer(change: Callable[[str], str]) -> Change:
    return lambda talk: replace(talk, answer=change(talk.answer))


def _user(change: Callable[[str], str]) -> Change:
    return lambda talk: replace(talk, user=change(talk.user))


TURNS = ("chat", "instruction", "sharegpt")
ANSWERED = (*TURNS, "prompt-completion", "preference")
# Faults in the text of a row: code, name, what the row becomes, the formats that can have it
TEXTUAL: list[tuple[str, str, Change, tuple[str, ...]]] = [
    ("mojibake", "latin", _answer(lambda a: a + " Le café est déjà fermé.".encode().decode("cp1252")), FORMATS),
    ("mojibake", "quotes", _answer(lambda a: a + " It’s “done”, he said.".encode().decode("cp1252", "replace")[:12]),
     ("chat", "text")),
    ("mojibake", "cyrillic", _user(lambda u: u + " Привет, как дела?".encode().decode("cp1251", "ignore")), ("chat", "text")),
    ("replacement-character", "", _answer(lambda a: a + " The caf\ufffd is shut."), FORMATS),
    ("null-byte", "", _answer(lambda a: a[:9] + "\0" + a[9:]), FORMATS),
    ("control-character", "backspace", _answer(lambda a: a + "\x08\x08"), FORMATS),
    ("control-character", "c1", _user(lambda u: u + " It\x92s late."), ("chat", "text")),
    ("control-character", "escape", _answer(lambda a: "\x1b[31m" + a + "\x1b[0m"), ("instruction",)),
    ("byte-order-mark", "", _user(lambda u: "\ufeff" + u), FORMATS),
    ("html-entity", "amp", _answer(lambda a: a + " So say Smith &amp; Sons."), FORMATS),
    ("html-entity", "quote", _answer(lambda a: a + " I don&#39;t know."), ("chat", "sharegpt")),
    ("mixed-script", "", _answer(lambda a: a + " So says Rаsputin."), FORMATS),  # a Cyrillic а
    ("placeholder-answer", "dots", _answer(lambda a: "..."), ANSWERED),
    ("placeholder-answer", "nan", _answer(lambda a: "nan"), ("instruction", "prompt-completion")),
    ("placeholder-answer", "removed", _answer(lambda a: "[removed]"), ("chat",)),
    ("control-token-in-text", "end", _answer(lambda a: a + "<|im_end|>"), TURNS),
    ("control-token-in-text", "user", _user(lambda u: u + "<|endoftext|>"), ("chat",)),
    ("already-rendered", "llama 2", _user(lambda u: f"[INST] {u} [/INST]"), FORMATS[:5]),
    ("already-rendered", "llama 3",
     _user(lambda u: f"<|start_header_id|>user<|end_header_id|>\n\n{u}<|eot_id|>"), TURNS),
    ("already-rendered", "chatml", _user(lambda u: f"<|im_start|>user\n{u}<|im_end|>\n"), TURNS),
    ("already-rendered", "gemma", _user(lambda u: f"<start_of_turn>user\n{u}<end_of_turn>\n"), TURNS),
    ("already-rendered", "phi", _user(lambda u: f"<|user|>\n{u}<|end|>\n<|assistant|>"), ("chat",)),
    ("already-rendered", "alpaca", _user(lambda u: "Below is an instruction that describes a task. Write a response.\n\n"
                                          f"### Instruction:\n{u}\n\n### Response:"), TURNS),
    ("already-rendered", "vicuna", _user(lambda u: f"USER: {u} ASSISTANT:"), ("chat", "sharegpt")),
    ("media-placeholder", "", _user(lambda u: f"<image>\n{u}"), FORMATS),
    ("too-long", "", _answer(lambda a: " ".join([a] * 99)[:4000]), FORMATS),
]  # fmt: skip


def _write_faulty_texts(folder: Path) -> Iterator[Case]:
    kinds = itertools.cycle(KINDS)
    for code, name, change, formats in TEXTUAL:
        for format in formats:
            kind = next(kinds)
            if kind == "csv" and code == "null-byte":
                kind = "json"  # Python's csv ends a file there in some releases
            bad = (3, 17, 18)
            talks = [change(talk) if i in bad else talk for i, talk in enumerate(read_dictionary())]
            path = folder / f"{code}-{name.replace(' ', '')}-{format}.{kind}"
            lines = write(path, [make_record(format, t) for t in talks])
            yield Case(path, code, [lines[i] for i in bad], options={"max_seq_len": 512})


def _write_similar_rows(folder: Path) -> Iterator[Case]:
    kinds = itertools.cycle(KINDS)

    def case(code: str, format: str, changed: dict[int, Talk], bad: list[int], *also: str, **options: Any) -> Case:
        talks = [changed.get(i, talk) for i, talk in enumerate(read_dictionary())]
        path = folder / f"{code}-{format}.{next(kinds)}"
        lines = write(path, [make_record(format, t) for t in talks])
        return Case(path, code, [lines[i] for i in bad], also, options)

    def validation(name: str, format: str, talks: list[Talk]) -> Path:
        write(folder / f"{name}-{format}.jsonl", [make_record(format, t) for t in talks])
        return folder / f"{name}-{format}.jsonl"

    talks = read_dictionary()
    long = Talk(talks[9].user, " ".join(t.answer for t in read_dictionary(100, 3)))
    nearly = Talk(long.user, long.answer.replace(" a ", " one ", 1))
    same = "I am sorry, but I cannot help you with that request."
    for format in FORMATS:
        repeated = Talk(f"{talks[4].user} ", talks[4].answer)  # white space does not make it another row
        yield case("duplicate", format, {30: repeated}, [30])
        yield case(
            "near-duplicate", format, {9: long, 25: _answer(lambda a: a.replace(" the ", " that ", 1))(long)}, [25]
        )
        held = validation("held", format, [*read_dictionary(0, 20, "validation"), talks[7]])
        yield case("overlap", format, {}, [7], validation=held)
        yield case("near-overlap", format, {12: long}, [12], validation=validation("nearly", format, [nearly]))
    for format in ANSWERED:
        salty = "Is the sea salty?"
        yield case("contradiction", format, {5: Talk(salty, "Yes."), 21: Talk(salty, "No.")}, [21])
        rows = range(10, 22)
        yield case("same-answer", format, {i: replace(talks[i], answer=same) for i in rows}, list(rows))
    yield case("same-pair", "preference", {11: Talk(talks[11].user, "I have no opinion on that matter.")}, [11])
    story = Talk(" ".join(t.answer for t in read_dictionary(50, 30)), "A long story.")
    for format in TURNS:
        options = {"max_seq_len": 512, "on_overlong": "truncate"}
        yield case("no-supervised-token", format, {14: story}, [14], "too-long", **options)


def _write_invalid_rows(folder: Path) -> Iterator[Case]:
    talks = read_dictionary()

    def case(code: str, format: str, bad: Any) -> Case:
        path = folder / f"{code}-{format}.jsonl"
        lines = [json.dumps(make_record(format, t)).encode() for t in talks]
        lines[6] = bad if isinstance(bad, bytes) else (bad if isinstance(bad, str) else json.dumps(bad)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
        return Case(path, code, [7])

    for format in FORMATS:
        good = make_record(format, talks[6])
        column = next(k for k in good if k != "prompt")
        yield case("bad-json", format, json.dumps(good)[:-9])
        yield case("not-utf8", format, json.dumps(good).encode().replace(b"Define", b"D\xe9fine"))
        yield case("not-an-object", format, [good])
        yield case("missing-column", format, {k + "s" * (k == column): v for k, v in good.items()})
        yield case("wrong-type", format, {**good, column: 7})
        if format not in ("chat", "sharegpt"):
            yield case("empty-content", format, {**good, column: " \n"})
            yield case("half-character", format, {**good, column: "a \ud83d"})
    yield case("empty-content", "chat", make_record("chat", Talk("Why?", "")))
    yield case("half-character", "chat", make_record("chat", Talk("Why?", "So \udc00")))
    yield case("unknown-role", "chat", json.dumps(make_record("chat", talks[6])).replace('"user"', '"usr"'))
    yield case("unknown-role", "sharegpt", json.dumps(make_record("sharegpt", talks[6])).replace("human", "hooman"))
    yield case("no-assistant-turn", "chat", {"messages": [{"role": "user", "content": "Hi"}]})
    yield case("no-assistant-turn", "sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]})
    yield case("missing-key", "chat", {"messages": [{"role": "user"}]})
    yield case("unknown-key", "chat", {"messages": [{"role": "user", "content": "a", "txt": "b"}]})
    question, answer = make_record("chat", talks[6])["messages"]
    yield case("nothing-to-learn", "chat", {"messages": [question, {**answer, "weight": 0}]})
    for format in ("instruction", "prompt-completion", "text", "chat"):
        path = folder / f"bad-csv-{format}.csv"
        lines = write(path, [make_record(format, t) for t in talks])
        text = path.read_text(encoding="utf-8").split("\n")
        text[lines[8] - 2] += ",more"  # the last line of the eighth row
        path.write_text("\n".join(text), encoding="utf-8")
        yield Case(path, "bad-csv", [lines[7]])
    path = folder / "bad-json-cut.json"
    write(path, [make_record("chat", t) for t in talks])
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    yield Case(path, "bad-json", [N])


def write_faulty_files(folder: Path) -> list[Case]:
    """Write every faulty file for a ChatML base; return what the report has to find in each, and nothing else."""
    return [*_write_faulty_texts(folder), *_write_similar_rows(folder), *_write_invalid_rows(folder)]
