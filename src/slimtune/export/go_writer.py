"""A learnt chat template in the syntax of Go's text/template, as Ollama takes it.

    {{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}gap{{ .Content }}after{{ else if … }}{{ end }}prompt{{ end }}

No action trims the text around it (`{{-`): line ends that belong to the prompt stand where they are sent.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence

from .infer_template import DATE, ROLES, Grammar, NotTurned
from .modelfile import printable

_MONTHS = [datetime.date(2000, m, 1).strftime("%b %B").split() for m in range(1, 13)]


def go(learnt: Grammar) -> str:
    """Return what was learnt in Go's syntax.

    Raises:
        NotTurned: a date in a format that cannot be made.
    """
    return _Writer(learnt).template()


class _Writer:
    def __init__(self, learnt: Grammar) -> None:
        self.learnt = learnt
        self.last = learnt.system == "last"
        self.gaps = {
            (before, role): gap[len(learnt.after.get(before, "")) :] for (before, role), gap in learnt.gaps.items()
        }
        self.opening = self._opening()
        self.trim, self.trimmed = self._trimmed()

    def template(self) -> str:
        body = self._head()
        for i, (role, text) in enumerate(
            [("system", self._system()), ("user", self._user()), ("assistant", self._answer())]
        ):
            body += f'{{{{ {"else " if i else ""}if eq .Role "{role}" }}}}{text}'
        others = _refusal("this TEMPLATE knows no messages but system, user and assistant")
        body += f"{{{{ else }}}}{others}{{{{ end }}}}"
        before, foot = "", ""
        if "$before" in body:
            before, foot = '{{ $before := "" }}', "{{ $before = .Role }}"
            foot = f'{{{{ if ne .Role "system" }}}}{foot}{{{{ end }}}}' if self.last else foot
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        return f"{before}{{{{ range $i, $_ := .Messages }}}}{last}{body}{foot}{{{{ end }}}}"

    def _opening(self) -> str:
        """Take off the gaps what stands before a first message that is not the system's: a default system prompt."""
        openings = set()
        for role in ("user", "assistant"):
            usual = {gap for (before, r), gap in self.gaps.items() if r == role and before in ("user", "assistant")}
            first, later = self.gaps.get(("", role), ""), usual.pop()
            openings.add(first.removesuffix(later) if not usual and first.endswith(later) else "")
        if len(openings) > 1 or "" in openings:
            return ""
        opening = openings.pop()
        # A system prompt that is written within a user's message has what opens that message before it.
        within = ("system",) if self.last else ()
        if not all(self.gaps["", role].startswith(opening) for role in within):
            return ""
        for role in ("user", "assistant", *within):
            self.gaps["", role] = self.gaps["", role].removeprefix(opening)
        return opening

    def _trimmed(self) -> tuple[tuple[str, str], list[str]]:
        """Return how contents are trimmed before anything else, and the roles whose contents are."""
        ways = {role: {t for (_, r), t in self.learnt.trims.items() if r == role} for role in ROLES.values()}
        common = {next(iter(way)) for way in ways.values() if way and way != {("", "")}}
        if len(common) != 1 or any(len(way) > 1 for way in ways.values()):
            return ("", ""), []
        trim = common.pop()
        return trim, [role for role, way in ways.items() if way == {trim} and not (role == "system" and self.last)]

    def _head(self) -> str:
        head = ""
        if self.opening:
            head += f'{{{{ if not (or $before (eq .Role "system")) }}}}{literal(self.opening)}{{{{ end }}}}'
        if self.trimmed:
            rounds = _trimming(self.trim, "$c")
            others = [role for role in ROLES.values() if role not in self.trimmed]
            if any(self.learnt.trims.get(pair) for pair in self.gaps if pair[1] in others):
                names = " ".join(f'"{role}"' for role in self.trimmed)
                rounds = f"{{{{ if eq .Role {names} }}}}{rounds}{{{{ end }}}}"
            head += f"{{{{ $c := .Content }}}}{rounds}"
        return head

    def _system(self) -> str:
        if self.last or self.learnt.system == "left out":
            return ""
        if self.learnt.system == "refused":
            return _refusal("the chat template refuses system messages")
        return self._turn("system") + self._prompt("system")

    def _user(self) -> str:
        plain = self._turn("user", leave=("system",) if self.last else ())
        if self.last:
            folded = self._turn("system", where="$.System") + self._turn("user", only="system")
            plain = f"{{{{ if and $last $.System }}}}{folded}{{{{ else }}}}{plain}{{{{ end }}}}"
        return plain + self._prompt("user")

    def _answer(self) -> str:
        after = literal(self.learnt.after["assistant"])
        return self._turn("assistant", ended=False) + (f"{{{{ if not $last }}}}{after}{{{{ end }}}}" if after else "")

    def _prompt(self, role: str) -> str:
        text = self.gaps.get((role, "prompt"), self.gaps["user", "prompt"])
        return f"{{{{ if $last }}}}{literal(text)}{{{{ end }}}}" if text else ""

    def _turn(
        self, role: str, where: str = ".Content", leave: Sequence[str] = (), only: str | None = None, ended: bool = True
    ) -> str:
        """Write a message: what stands before it, its content, what stands after it.

        Args:
            role: of the message.
            where: where its content is.
            leave: roles that cannot stand before it here.
            only: the one role that stands before it here.
            ended: whether what stands after it is written.
        """
        kinds: dict[tuple[str, tuple[str, str]], list[str]] = {}
        for (before, this), text in self.gaps.items():
            if this == role and before not in leave and only in (None, before):
                kinds.setdefault((text, self.learnt.trims[before, role]), []).append(before)
        shared = min((text for text, _ in kinds), key=len)
        trims = {trim for _, trim in kinds}
        if len(trims) > 1 or not all(text.endswith(shared) for text, _ in kinds):
            shared = ""
        # The commonest comes last and has no condition: neighbours that the chat template refuses are written as it is.
        ordered = sorted(kinds.items(), key=lambda item: (len(item[1]), "assistant" in item[1], "user" in item[1]))
        pieces = []
        for (text, trim), befores in ordered:
            piece = literal(text.removesuffix(shared) if shared else text)
            pieces.append((befores, piece + (self._content(role, where, trim) if len(trims) > 1 else "")))
        said = _chosen(pieces) + literal(shared)
        said += self._content(role, where, trims.pop()) if len(trims) == 1 else ""
        return said + (literal(self.learnt.after.get(role, "")) if ended else "")

    def _content(self, role: str, where: str, trim: tuple[str, str]) -> str:
        if role in self.trimmed:
            return "{{ $c }}"
        return f"{{{{ $x := {where} }}}}{_trimming(trim, '$x')}{{{{ $x }}}}" if any(trim) else f"{{{{ {where} }}}}"


def _refusal(why: str) -> str:
    """Write an error: Go's templates raise none of their own, and a message left out would be worse."""
    return f'{{{{ slice "{why}" 99 }}}}'


def _trimming(trim: tuple[str, str], name: str) -> str:
    """Write what takes characters off the ends of a variable: each round takes one, so there are enough rounds."""
    but_one = f"(len (slice {name} 1))"
    ends = [(f"slice {name} 0 1", f"slice {name} 1"), (f"slice {name} {but_one}", f"slice {name} 0 {but_one}")]
    tests = "{{ else ".join(
        f"if eq ({end}) {' '.join(map(_string, chars))} }}}}{{{{ {name} = {rest} }}}}"
        for (end, rest), chars in zip(ends, trim, strict=True)
        if chars
    )
    return f"{{{{ range len {name} }}}}{{{{ {tests}{{{{ else }}}}{{{{ break }}}}{{{{ end }}}}{{{{ end }}}}"


def _chosen(pieces: list[tuple[list[str], str]]) -> str:
    """Write what stands before a message, by the roles that precede it; the last of the pieces has no condition."""
    *cases, (_, rest) = pieces
    conditions = ["not $before" if b == [""] else f"eq $before {' '.join(map(_string, b))}" for b, _ in cases]
    if len(cases) == 1 and not cases[0][1]:
        return f"{{{{ if not ({conditions[0]}) }}}}{rest}{{{{ end }}}}" if rest else ""
    chain = "{{ else ".join(f"if {c} }}}}{piece}" for c, (_, piece) in zip(conditions, cases, strict=True))
    otherwise = f"{{{{ else }}}}{rest}" if rest else ""
    return f"{{{{ {chain}{otherwise}{{{{ end }}}}" if cases else rest


def literal(text: str) -> str:
    """Return text as a Go template that gives it, in characters that a Modelfile carries.

    Raises:
        NotTurned: it holds a date in a format that cannot be made.
    """
    pieces = re.split(f"{DATE[0]}(.*?){DATE[1]}", text, flags=re.DOTALL)
    return "".join(_date(p) if i % 2 else _literal(p) for i, p in enumerate(pieces))


def _literal(text: str) -> str:
    """Write braces, runs of quotes and characters that Ollama drops as Go strings, the rest as it stands."""
    out = ""
    for piece in re.findall(r'\{+|"+|[^{"]+', text):
        quoted = piece[0] == "{" or (piece[0] == '"' and len(piece) > 2)
        for kept, run in itertools.groupby(piece, key=lambda c: not quoted and (printable(c) or c in "\n\t")):
            part = "".join(run)
            out += part if kept else f"{{{{ {_string(part)} }}}}"
    return out


def _string(text: str) -> str:
    """Return a Go string in ASCII; no two quotes of it stand together."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if " " <= char <= "~" and char not in '"\\':
        return char
    named = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\v": "\\v", "\f": "\\f"}
    return named.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")


_DIGITS = {"Y": "0 4", "y": "2 4", "m": "5 7", "d": "8 10"}


def _date(style: str) -> str:
    """Write today's date in a format of strftime; Ollama gives it as 2031-03-09."""
    out = ""
    for code, text in re.findall(r"%(-?.)|([^%]+)", style.replace("%F", "%Y-%m-%d")):
        if text or code == "%":
            out += literal(text or "%")
        elif code in _DIGITS:
            out += f"{{{{ slice currentDate {_DIGITS[code]} }}}}"
        elif code in "bhB":
            names = [month[code == "B"] for month in _MONTHS]
            chain = "{{ else ".join(f'if eq $month "{m:02}" }}}}{name}' for m, name in enumerate(names, 1))
            out += f"{{{{ $month := slice currentDate 5 7 }}}}{{{{ {chain}{{{{ end }}}}"
        else:
            raise NotTurned(f"the chat template writes the date as {style!r}, which Ollama cannot")
    return out
