"""The part of Go's text/template that our Ollama templates are written in, executed here: what Ollama will send.

    {{ if }} {{ else if }} {{ else }} {{ range }} {{ break }} {{ continue }} {{ end }}      text is copied as it stands
    {{ $x := … }} {{ $x = … }} {{ .A.B }} {{ $x.A }} {{ f a b }} {{ a | f b }} {{ (…).A }}   {{- and -}} trim it

Functions: and or not, eq ne lt le gt ge, len, slice, index, and Ollama's currentDate. Strings are bytes, as in Go:
`len` and `slice` count bytes. Whatever lies outside this part is an error, never skipped. The tests render the same
templates with Go's own engine and compare.
"""

from __future__ import annotations

import ast
import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any

_ACTION = re.compile(r'\{\{(- )?((?:"(?:\\.|[^"\\\n])*"|`[^`]*`|/\*.*?\*/|(?!\}\})[^"`])*?)( -)?\}\}', re.DOTALL)
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\\n])*"|`[^`]*`)|(?P<number>-?\d+)|(?P<variable>\$\w*(?:\.\w+)*)|(?P<field>(?:\.\w+)+|\.)'
    r"|(?P<word>\w+)|(?P<sign>:=|[=|(),]))"
)
_BLANK = " \t\r\n"


class GoTemplateError(ValueError):
    """A template that Go's engine refuses, or that is outside the part executed here."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def render(template: str, data: Mapping[str, Any], today: datetime.date | None = None) -> str:
    """Return what a template makes of `data`.

    Args:
        template: Go's syntax.
        data: what `.` is: strings, whole numbers, lists, mappings with string keys, None.
        today: what `currentDate` gives; None: the date of now.

    Raises:
        GoTemplateError: the template is faulty, or not of the part executed here.
    """
    nodes, rest = _block(_parts(template), 0)
    if rest is not None:
        raise GoTemplateError(f"{{{{ {rest} }}}} closes nothing")
    run = _Run(today or datetime.date.today())
    try:
        run.nodes(nodes, data, [{"$": data}])
    except (_Break, _Continue) as error:
        raise GoTemplateError("break outside of a range") from error
    return b"".join(run.out).decode("utf-8", "surrogateescape")


# Parsing: text and actions, then a tree of ("text", …), ("do", …), ("if" | "range", head, body, otherwise).


def _parts(template: str) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip(_BLANK) if trim else text
        text = text.rstrip(_BLANK) if found[1] else text
        inner = found[2].strip()
        if text:
            parts.append(("text", text))
        if not inner.startswith("/*"):
            parts.append(("action", inner))
        at, trim = found.end(), bool(found[3])
    last = template[at:]
    if any("{{" in text for text in [last, *(t for kind, t in parts if kind == "text")]):
        raise GoTemplateError("an action is not closed")
    parts.append(("text", last.lstrip(_BLANK) if trim else last))
    return parts


def _block(parts: list[tuple[str, str]], depth: int) -> tuple[list[Any], str | None]:
    """Take nodes off `parts` up to the action that ends the block, which is returned too."""
    nodes: list[Any] = []
    while parts:
        kind, text = parts.pop(0)
        word, _, head = text.partition(" ")
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or word == "else":
            return nodes, text
        elif word in ("if", "range"):
            nodes.append(_branch(word, head, parts, depth + 1))
        else:
            nodes.append(("do", text))
    if depth:
        raise GoTemplateError("{{ end }} is missing")
    return nodes, None


def _branch(word: str, head: str, parts: list[tuple[str, str]], depth: int) -> tuple[str, str, list[Any], list[Any]]:
    body, closed = _block(parts, depth)
    otherwise: list[Any] = []
    if closed is not None and closed.startswith("else if ") and word == "if":
        otherwise = [_branch("if", closed.removeprefix("else if "), parts, depth)]
    elif closed == "else":
        otherwise, closed = _block(parts, depth)
        if closed != "end":
            raise GoTemplateError("{{ end }} is missing")
    elif closed != "end":
        raise GoTemplateError(f"{{{{ {closed} }}}} in a {word}")
    return word, head, body, otherwise


# Execution.


class _Run:
    def __init__(self, today: datetime.date) -> None:
        self.out: list[bytes] = []
        self.today = today

    def nodes(self, nodes: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> None:
        scopes = [*scopes, {}]
        for node in nodes:
            if node[0] == "text":
                self.out.append(node[1].encode("utf-8", "surrogateescape"))
            elif node[0] == "if":
                found, inner = self.head(node[1], dot, [*scopes, {}])
                self.nodes(node[2] if _true(found) else node[3], dot, inner)
            elif node[0] == "range":
                self.loop(node, dot, scopes)
            elif node[1] == "break":
                raise _Break
            elif node[1] == "continue":
                raise _Continue
            else:
                self.do(node[1], dot, scopes)

    def head(self, text: str, dot: Any, scopes: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        names, _, pipe = _assignment(text)
        found = self.value(pipe, dot, scopes)
        if names:
            scopes[-1][names[0]] = found
        return found, scopes

    def do(self, text: str, dot: Any, scopes: list[dict[str, Any]]) -> None:
        names, declares, pipe = _assignment(text)
        found = self.value(pipe, dot, scopes)
        if names:
            (scopes[-1] if declares else _scope_of(names[0], scopes))[names[0]] = found
        else:
            self.out.append(_printed(found))

    def loop(self, node: Any, dot: Any, scopes: list[dict[str, Any]]) -> None:
        names, _, pipe = _assignment(node[1])
        over = self.value(pipe, dot, scopes)
        whole = isinstance(over, int) and not isinstance(over, bool)
        if not whole and not isinstance(over, list | tuple) and over is not None:
            raise GoTemplateError(f"range can't iterate over {over!r}")
        if whole and len(names) > 1:
            raise GoTemplateError("range over a number has one variable")
        items = list(range(over)) if whole else list(over or ())
        for i, item in enumerate(items):
            item = _go(item)
            held = dict(zip(names, (i, item) if len(names) == 2 else (item,), strict=False))
            try:
                self.nodes(node[2], item, [*scopes, held])
            except _Break:
                break
            except _Continue:
                continue
        if not items:
            self.nodes(node[3], dot, scopes)

    def value(self, text: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
        tokens = _tokens(text)
        found = self.pipe(tokens, dot, scopes)
        if tokens:
            raise GoTemplateError(f"{tokens[0][1]!r} was not expected in {text!r}")
        return found

    def pipe(self, tokens: list[tuple[str, str]], dot: Any, scopes: list[dict[str, Any]]) -> Any:
        found = self.command(tokens, dot, scopes, ())
        while tokens and tokens[0] == ("sign", "|"):
            tokens.pop(0)
            found = self.command(tokens, dot, scopes, (found,))
        return found

    def command(
        self, tokens: list[tuple[str, str]], dot: Any, scopes: list[dict[str, Any]], last: tuple[Any, ...]
    ) -> Any:
        if tokens and tokens[0][0] == "word" and tokens[0][1] not in ("true", "false", "nil"):
            name = tokens.pop(0)[1]
            operands = []
            # `and` and `or` stop at the operand that decides: what follows may not be computable.
            decided = {"and": lambda v: not _true(v), "or": _true}.get(name)
            settled: list[Any] = []
            while tokens and not (tokens[0][0] == "sign" and tokens[0][1] in "|)"):
                if settled:
                    self.skip(tokens)
                    continue
                operands.append(self.operand(tokens, dot, scopes))
                if decided is not None and decided(operands[-1]):
                    settled = [operands[-1]]
            return settled[0] if settled else self.call(name, (*operands, *last))
        found = self.operand(tokens, dot, scopes)
        if last or (tokens and not (tokens[0][0] == "sign" and tokens[0][1] in "|)")):
            raise GoTemplateError("a value is given operands as if it were a function")
        return found

    def skip(self, tokens: list[tuple[str, str]]) -> None:
        depth = 0
        while tokens:
            kind, text = tokens.pop(0)
            depth += {"(": 1, ")": -1}.get(text, 0) if kind == "sign" else 0
            if depth == 0 and not (tokens and tokens[0][0] == "chained"):
                return

    def operand(self, tokens: list[tuple[str, str]], dot: Any, scopes: list[dict[str, Any]]) -> Any:
        if not tokens:
            raise GoTemplateError("an operand is missing")
        kind, text = tokens.pop(0)
        if kind == "string":
            return (text[1:-1] if text[0] == "`" else _unescaped(text)).encode("utf-8", "surrogateescape")
        if kind == "number":
            return int(text)
        if kind == "field":
            return dot if text == "." else _field(dot, text)
        if kind == "variable":
            name, point, fields = text.partition(".")
            return _field(_scope_of(name, scopes)[name], point + fields)
        if kind == "word" and text in ("true", "false", "nil"):
            return {"true": True, "false": False, "nil": None}[text]
        if kind == "word":
            return self.call(text, ())
        if text == "(":
            found = self.pipe(tokens, dot, scopes)
            if not tokens or tokens.pop(0) != ("sign", ")"):
                raise GoTemplateError("a bracket is not closed")
            return _field(found, tokens.pop(0)[1]) if tokens and tokens[0][0] == "chained" else found
        raise GoTemplateError(f"{text!r} is no operand")

    def call(self, name: str, operands: tuple[Any, ...]) -> Any:
        if name == "currentDate":
            return self.today.isoformat().encode()
        if name not in _FUNCTIONS:
            raise GoTemplateError(f"the function {name!r} is not executed here")
        try:
            return _go(_FUNCTIONS[name](*operands))
        except (TypeError, IndexError, KeyError) as error:
            raise GoTemplateError(f"error calling {name}: {error}") from error


def _assignment(text: str) -> tuple[list[str], bool, str]:
    """Return the variables that an action sets, whether it declares them, and the pipeline."""
    found = re.match(r"(\$\w+)(?:\s*,\s*(\$\w+))?\s*(:?=)\s*(.*)", text, re.DOTALL)
    return ([n for n in (found[1], found[2]) if n], found[3] == ":=", found[4]) if found else ([], False, text)


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at, text = 0, text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise GoTemplateError(f"{text[at:]!r} is not understood")
        kind = str(found.lastgroup)
        # `(f).A` is a field of what stands in the brackets, `(f) .A` an operand of its own.
        chained = kind == "field" and tokens and tokens[-1][1] == ")" and found.start() == found.start(kind)
        tokens.append(("chained" if chained else kind, found[kind]))
        at = found.end()
    return tokens


def _unescaped(text: str) -> str:
    if re.search(r"\\[^abfnrtvxuU\\\"0-7]", text):
        raise GoTemplateError(f"{text} holds an escape that Go does not know")
    return str(ast.literal_eval(text))


def _scope_of(name: str, scopes: list[dict[str, Any]]) -> dict[str, Any]:
    for scope in reversed(scopes):
        if name in scope:
            return scope
    raise GoTemplateError(f"undefined variable {name}")


def _field(value: Any, path: str) -> Any:
    for name in path.split(".")[1:]:
        if not isinstance(value, Mapping) or name not in value:
            raise GoTemplateError(f"can't evaluate field {name}")
        value = _go(value[name])
    return value


def _go(value: Any) -> Any:
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def _true(value: Any) -> bool:
    return bool(value)


def _printed(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    raise GoTemplateError(f"{value!r} is not text")


def _compared(test: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    def compare(one: Any, *others: Any) -> bool:
        if not others or any(type(one) is not type(other) for other in others):
            raise TypeError("incompatible types for comparison")
        return any(test(one, other) for other in others)

    return compare


def _slice(value: Any, *at: int) -> Any:
    start, end = at[0] if at else 0, at[1] if len(at) > 1 else len(value)
    if not 0 <= start <= end <= len(value):
        raise IndexError(f"index out of range: {at}")
    return value[start:end]


def _index(value: Any, *at: Any) -> Any:
    for i in at:
        if isinstance(value, list | tuple) and not 0 <= i < len(value):
            raise IndexError(f"index out of range: {i}")
        value = value[i.decode() if isinstance(i, bytes) else i]
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *v: v[-1],
    "or": lambda *v: v[-1],
    "not": lambda v: not _true(v),
    "eq": _compared(lambda a, b: a == b),
    "ne": _compared(lambda a, b: a != b),
    "lt": _compared(lambda a, b: a < b),
    "le": _compared(lambda a, b: a <= b),
    "gt": _compared(lambda a, b: a > b),
    "ge": _compared(lambda a, b: a >= b),
    "len": len,
    "slice": _slice,
    "index": _index,
}
