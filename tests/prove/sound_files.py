"""Sound data files that look faulty to a careless reader: the data report has to find nothing in them.

The text is from The Devil's Dictionary, Python's own documentation and source, Unicode's tables, and `sound_rows.json`:
the Universal Declaration of Human Rights (article 1, in twenty languages), and rows written for these tests.
"""

import argparse
import calendar
import collections
import difflib
import functools
import heapq
import html.parser
import http.server
import inspect
import itertools
import json
import statistics
import string
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faulty_files import FORMATS, KINDS, Talk, make_record, read_dictionary, write

WRITTEN = json.loads(Path(__file__).with_name("sound_rows.json").read_text(encoding="utf-8"))
RIGHTS = WRITTEN.pop("languages")
DEFINE = {"type": "function", "function": {"name": "define", "description": "Look a word up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}}  # fmt: skip
FUNCTIONS: list[Callable[..., Any]] = [
    textwrap.wrap, textwrap.dedent, textwrap.indent, heapq.merge, heapq.nlargest, statistics.median, statistics.mode,
    statistics.stdev, string.capwords, calendar.isleap, calendar.monthrange, difflib.get_close_matches, difflib.ndiff,
    functools.reduce, functools.lru_cache, functools.wraps, inspect.cleandoc, inspect.getdoc, inspect.getsource,
    collections.namedtuple, json.dumps, json.loads, argparse.ArgumentParser.add_subparsers,
    html.parser.HTMLParser.feed, http.server.SimpleHTTPRequestHandler.send_head,
]  # fmt: skip
CHARACTERS = (*range(0xA1, 0x17F), *range(0x391, 0x3CE), *range(0x410, 0x450), *range(0x1F600, 0x1F640))
ADD = "You add two numbers. Say the numbers, then the result, in one sentence, and nothing else. The numbers are"
JUDGE = ("Say whether the author of the following text looks kindly on its subject. Answer with one word, either "
         "positive or negative, in lower case and without a full stop. Judge by the text alone.\n\nText: ")  # fmt: skip
MORSE = dict(zip("etianmsurwdkgohvflpjbxcyzq", [".", "-", "..", ".-", "-.", "--", "...", "..-", ".-.", ".--", "-..", "-.-", "--.", "---", "....", "...-", "..-.", ".-..", ".--.", ".---", "-...", "-..-", "-.-.", "-.--", "--..", "--.-"], strict=True))  # fmt: skip


def make_talks() -> dict[str, list[Talk]]:
    """Return rows of one turn, by the name of their file."""
    entries = read_dictionary(0, 779)
    rules = "You are a dictionary. " + " ".join(t.answer for t in entries[400:404])
    sources = [(f, inspect.getsource(f)) for f in FUNCTIONS if inspect.isfunction(f)]
    pairs = itertools.islice(itertools.permutations(RIGHTS, 2), 0, None, 7)
    talks = {
        "dictionary": entries,
        "languages": [Talk(f"What is article 1 of the Declaration of Human Rights in {name}?", text)
                      for name, text in RIGHTS.items()],
        "translations": [Talk(f"Translate into {b}:\n{RIGHTS[a]}", RIGHTS[b]) for a, b in pairs],
        "source": [Talk(f"Show me how Python implements `{f.__qualname__}`.", f"```python\n{s}```") for f, s in sources],
        "documentation": [Talk(f"What does `{f.__qualname__}` do?", doc) for f in FUNCTIONS if (doc := inspect.getdoc(f))],
        "sums": [Talk(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a in range(12, 30) for b in range(3, 15)],
        "sums-in-words": [Talk(f"{ADD} {a} and {b}.", f"The sum of the numbers {a} and {b} is the number {a + b}.")
                          for a in range(101, 116) for b in range(211, 219)],
        "characters": [Talk(f"Which Unicode character is “{chr(i)}”?", unicodedata.name(chr(i)))
                       for i in CHARACTERS if unicodedata.name(chr(i), "")],
        "reviews": [Talk(JUDGE + t.answer, "negative" if i % 3 else "positive") for i, t in enumerate(entries[:90])],
        "reading": [talk for p in range(100, 136, 6) for talk in _ask_about(entries[p : p + 6])],
        # Several long answers to one prompt.
        "stories": [Talk("Tell me what a word of your choice means.", " ".join(t.answer for t in entries[i : i + 3]))
                    for i in range(0, 60, 3)],
        "morse": [Talk(f"Write “{word}” in Morse code.", " ".join(MORSE[c] for c in word)) for t in entries[:60]
                  if (word := t.user[8:-2]).isalpha() and word.islower() and word.isascii()],
        "long": [Talk("Define what follows, one after another: " + ", ".join(t.user[7:-1] for t in some) + ".",
                      "\n\n".join(t.answer for t in some)) for some in (entries[i : i + 12] for i in range(0, 600, 12))],
        "system-prompt": [Talk(t.user, t.answer, rules) for t in entries[:40]],
        "two-rows": [Talk(t.user, t.answer, rules) for t in entries[:2]],
    }  # fmt: skip
    for i, (name, rows) in enumerate(WRITTEN.items()):
        others = [] if name == "terse" else entries[170 + 30 * i : 190 + 30 * i]
        talks[name] = [*itertools.starmap(Talk, rows), *others]
    return talks


def _ask_about(entries: list[Talk]) -> Iterator[Talk]:
    """Questions about a passage that several rows share."""
    passage = "\n".join(f"{t.user[8:-2]}: {t.answer}" for t in entries)
    for t in entries:
        yield Talk(f"{passage}\n\nHow many words define {t.user[8:-1]}?", str(len(t.answer.split())))


def make_rows() -> dict[str, list[dict[str, Any]]]:
    """Return chats of several turns, with weights, and with tools, by the name of their file."""
    system = {"role": "system", "content": "You are Ambrose Bierce. Be brief, be bitter, and never apologise."}
    conversations, weighted, tools = [], [], []
    for i in range(0, 90, 3):
        turns = [turn for t in read_dictionary(i, 3) for turn in make_record("chat", t)["messages"]]
        conversations.append({"messages": [system, *turns]})
        weighted.append({"messages": [system, turns[0], {**turns[1], "weight": 0}, *turns[2:]]})
    for i, t in enumerate(read_dictionary(0, 24)):
        call = {"id": f"call_{i}", "type": "function"}
        call |= {"function": {"name": "define", "arguments": {"word": t.user[8:-2]}}}
        tools.append({"tools": [DEFINE], "messages": [
            {"role": "user", "content": t.user},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": t.answer, "tool_call_id": f"call_{i}"},
            {"role": "assistant", "content": f"In Bierce's words: {t.answer}"},
        ]})  # fmt: skip
    return {"conversations": conversations, "weighted": weighted, "tools": tools}


def write_sound_files(folder: Path) -> Iterator[Path]:
    """Write every sound file, those of one turn in two formats; yield their paths."""
    kinds, formats = itertools.cycle(KINDS), itertools.cycle(FORMATS)
    for name, talks in make_talks().items():
        for _ in range(2):
            format, kind = next(formats), next(kinds)
            if format == "text" and name in ("reading", "translations"):
                format = "chat"  # as mere texts their rows are nearly the same, in another order
            path = folder / f"{name}-{format}.{kind}"
            write(path, [make_record(format, t) for t in talks])
            yield path
    for name, rows in make_rows().items():
        write(folder / f"{name}.jsonl", rows)
        yield folder / f"{name}.jsonl"
