"""Grammars that bind answers: a JSON Schema, a regular expression or a list of choices says which tokens may come next.

    JSON Schema, regex   →   Lark grammar   →   compiled for a tokenizer, cached   →   a matcher for each answer

llguidance compiles and matches; it is the library inside llama.cpp, too, so that both engines read the same grammar. A
new grammar is compiled in a process of its own first (`grammar_check`): it may come from anybody.
"""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.foundation.files import parse_json
from ..errors import UsageError, format_install_command, format_names, suggest

MAX_GRAMMAR_BYTES, MAX_DEPTH = 200_000, 100
"""Most bytes of a grammar, and most lists and objects inside one another in a schema."""
CHECK_SECONDS, CHECK_CPU_SECONDS, CHECK_BYTES = 10, 5, 1 << 30
"""Most time, processor time and memory of the process that compiles a new grammar first."""
MAX_CACHED = 64
"""Grammars that stay compiled."""
PARSER_LIMITS: dict[str, Any] = {"step_lexer_fuel": 100_000, "max_lexer_states": 50_000, "verbose_errors": False}
"""llguidance's: a step stays under some 20 ms, and a grammar under some 100 MB; the others are its defaults."""
JSON_SPACE = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}"}
"""White space in JSON, as in llama.cpp's own grammars: a small model may write it without end where any is allowed."""
JSON_ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The same for llguidance before 1.8, which is in llama.cpp: it reads the pattern as any number of such texts."""
SAMPLE_TEXT = '{"a b": [1, -2.5e3, true, null], "c": "x . y, isn\'t z!"}'
"""A tokenizer must write it as it is, or its tokens are not those of the grammar's text."""

_SUBSCHEMAS = {
    "items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
    "propertyNames", "not", "if", "then", "else", "allOf", "anyOf", "oneOf", "prefixItems",
}  # fmt: skip
_NAMED_SUBSCHEMAS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_OTHER_KEYWORDS = {
    "type", "enum", "const", "required", "minLength", "maxLength", "pattern", "format", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minContains",
    "maxContains", "minProperties", "maxProperties", "dependentRequired", "dependencies", "$ref", "$id", "id",
    "$schema", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary",
    "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "contentMediaType", "contentEncoding", "contentSchema", "discriminator",
}  # fmt: skip
KEYWORDS = _SUBSCHEMAS | _NAMED_SUBSCHEMAS | _OTHER_KEYWORDS
"""Of JSON Schema, drafts 4 to 2020-12, and `discriminator` of OpenAPI; llguidance refuses what it cannot enforce."""


class GrammarError(UsageError):
    """A grammar cannot bind an answer: it is wrong, too large, or no text matches it."""

    code = "wrong-grammar"


def make_json_schema_grammar(schema: dict[str, Any], *, on_one_line: bool = False) -> str:
    """Return the grammar of the JSON values that a schema allows.

    Args:
        schema: of any draft, without keywords that it does not have.
        on_one_line: whether the JSON has no other white space than a space after commas and colons.

    Raises:
        GrammarError: it has unknown keywords, or is too large or too deep.
    """
    _require_shallow(schema)
    for keyword in _iterate_keywords(schema):
        if keyword not in KEYWORDS and (keyword == "x-guidance" or not keyword.startswith("x-")):
            raise GrammarError(f"the schema has the unknown keyword {keyword[:100]!r}{suggest(keyword, KEYWORDS)}")
    try:
        text = _format_json(schema | {"x-guidance": JSON_ON_ONE_LINE if on_one_line else JSON_SPACE})
    except ValueError as error:
        raise GrammarError("the schema has a number that JSON cannot write") from error
    return _require_text_of_size(f"start: %json {text}")


def make_regex_grammar(regex: str) -> str:
    r"""Return the grammar of the texts that a regular expression matches as a whole; `\d` is 0 to 9.

    Raises:
        GrammarError: it is too large.
    """
    _require_llguidance()
    from llguidance import regex_to_lark

    _require_text_of_size(regex)
    return f"start: /{regex_to_lark(regex, 'd')}/"


def make_choice_grammar(choices: Sequence[str]) -> str:
    """Return the grammar of some texts; raise GrammarError if they are too large."""
    return _require_text_of_size("start: " + " | ".join(map(_format_json, choices)))


def _format_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _require_text_of_size(grammar: str) -> str:
    """Return a grammar; raise GrammarError if it is too large, or has half of a character."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"the grammar has {len(grammar):,} characters", f"at most {MAX_GRAMMAR_BYTES:,}")
    try:
        grammar.encode()
    except UnicodeEncodeError as error:
        raise GrammarError("the grammar contains half of a character") from error
    return grammar


def _require_shallow(value: Any) -> None:
    """Raise GrammarError if too many lists and objects are inside one another."""
    level, depth = [value], 0
    while level := [
        inner
        for each in level
        if isinstance(each, dict | list)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise GrammarError("the schema is nested too deep", f"at most {MAX_DEPTH} levels")


def _iterate_keywords(schema: Any) -> Iterator[str]:
    """Yield the keywords of a schema and of those in it."""
    for keyword, value in schema.items() if isinstance(schema, dict) else ():
        yield keyword
        if keyword in _SUBSCHEMAS:
            inner = value if isinstance(value, list) else [value]
        else:
            inner = list(value.values()) if keyword in _NAMED_SUBSCHEMAS and isinstance(value, dict) else []
        for each in inner:
            yield from _iterate_keywords(each)


class AnswerMatcher:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def can_end(self) -> bool:
        """Whether the answer is complete."""
        return bool(self._matcher.is_accepting())

    @property
    def must_end(self) -> bool:
        """Whether the answer is complete, and nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def find_allowed_tokens(self, vocab_size: int) -> Tensor:
        """Return the tokens that may come next, int64; an end token may where the answer is complete.

        Raises:
            GrammarError: the grammar needs too much time or memory here.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        bits = np.unpackbits(packed, count=vocab_size, bitorder="little").view(np.bool_)  # four times as fast as uint8
        return torch.from_numpy(bits.nonzero()[0])

    def accept_token(self, token: int) -> None:
        """Go on by a token that is allowed; raise GrammarError if it is not."""
        self._matcher.consume_token(token)
        self._require_sound()

    def accept_text(self, text: str) -> None:
        """Go on by a text, in a grammar that is compiled for bytes; raise GrammarError if it is not allowed."""
        self._matcher.consume_tokens(list(text.encode()))
        self._require_sound()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            reason = _clean_message(self._matcher.get_error())
            raise GrammarError(f"the grammar became too complex in the answer: {reason}", "a simpler one")


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar, compiled for the tokens of a model or for bytes."""

    lark: str
    matcher: Any = field(repr=False)

    def start_answer(self) -> AnswerMatcher:
        """Return the beginning of an answer."""
        return AnswerMatcher(self.matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars, and remembers the last ones and their errors. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: dict[object, Any] = {}
        self._compiled: OrderedDict[tuple[object, str], CompiledGrammar | GrammarError] = OrderedDict()

    def compile_for_tokens(
        self, lark: str, tokenizer: Any, end_tokens: frozenset[int], vocab_size: int
    ) -> CompiledGrammar:
        """Compile a grammar for the tokens of a model.

        Raises:
            GrammarError: it is wrong or too large, no text matches it, or the tokenizer's texts cannot be followed.
        """
        _require_llguidance()
        with self._lock:
            key = (id(tokenizer), end_tokens, vocab_size)  # the models of a server keep their tokenizers
            if key not in self._tokenizers:
                self._tokenizers[key] = self._build_tokenizer(tokenizer, end_tokens, vocab_size)
            own = self._tokenizers[key]
        return self._compile(lark, own)

    def compile_for_bytes(self, lark: str) -> CompiledGrammar:
        """Compile a grammar that checks a text; errors as for `compile_for_tokens`."""
        _require_llguidance()
        from llguidance import LLTokenizer

        with self._lock:
            own = self._tokenizers.setdefault(None, LLTokenizer("byte"))
        return self._compile(lark, own)

    def _build_tokenizer(self, tokenizer: Any, end_tokens: frozenset[int], vocab_size: int) -> Any:
        """Return llguidance's form of a tokenizer; runs whose tokenizers are equal share one."""
        from llguidance import LLTokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise GrammarError("grammars need a tokenizer with a tokenizer.json, and this model has none")
        content = type(backend).from_str(backend.to_str())  # a copy of its own
        content.no_padding()
        content.no_truncation()
        text = content.to_str()
        key = (sha256(text.encode()).digest(), end_tokens, vocab_size)
        if key not in self._tokenizers:
            size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
            made = LLTokenizer(text, n_vocab=size, eos_token=sorted(end_tokens) or None)
            ids = tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"]
            if not made.decode_str(ids).strip() == tokenizer.decode(ids).strip() == SAMPLE_TEXT:
                raise GrammarError("this model's tokenizer does not write a text as it is, so no grammar can bind it")
            self._tokenizers[key] = made
        return self._tokenizers[key]

    def _compile(self, lark: str, tokenizer: Any) -> CompiledGrammar:
        key = (id(tokenizer), lark)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
        if found is None:
            try:
                _check_in_process(lark)
                found = _compile_here(lark, tokenizer)
            except GrammarError as error:
                if error.__cause__ is not None:  # too much time, which may be that of other work on the machine
                    raise
                found = error
            with self._lock:
                self._compiled[key] = found
                while len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
        if isinstance(found, GrammarError):
            raise GrammarError(found.message, found.expected)
        return found


def _compile_here(lark: str, tokenizer: Any) -> CompiledGrammar:
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, lark, log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
    first = matcher.deep_copy()
    if not matcher.is_error():
        first.compute_bitmask()  # the lexer's first states are built here, not in the thread of the model
    if error := matcher.get_error() or first.get_error():
        raise _make_error(error)
    return CompiledGrammar(lark, matcher)


def _check_in_process(lark: str) -> None:
    """Compile a grammar in a process of its own; raise GrammarError if it is wrong, or takes too much."""
    from . import grammar_check

    spec = importlib.util.find_spec("llguidance")
    folder = str(Path(spec.origin).parents[1]) if spec is not None and spec.origin else ""
    command = [sys.executable, "-P", "-S", "-E", grammar_check.__file__, folder]
    try:
        done = subprocess.run(
            [*command, str(CHECK_CPU_SECONDS), str(CHECK_BYTES)],
            input=lark.encode(), capture_output=True, timeout=CHECK_SECONDS, check=True,
        )  # fmt: skip
        error = parse_json(done.stdout)["error"]
    except (subprocess.SubprocessError, ValueError) as failure:
        raise GrammarError("the grammar is too large: compiling it takes too much time or memory") from failure
    if error is not None:
        raise _make_error(error)


def _make_error(error: str) -> GrammarError:
    """Return the error for what llguidance says of a grammar, in plain words."""
    if "NoExtension" in error:
        return GrammarError("no answer can match the grammar")
    if "Unimplemented keys" in error:
        names = re.findall(r'"([^"]+)"', error.partition("\n")[0].partition("Unimplemented keys")[2])
        return GrammarError(f"a grammar cannot enforce {format_names(names)} of the schema", "a schema without it")
    if "oneOf constraints" in error:
        return GrammarError("a grammar cannot enforce a oneOf whose schemas have values in common", "anyOf")
    if "retrieving it failed" in error:
        return GrammarError("the schema refers to another document, which is not fetched", "$ref to a part of itself")
    return GrammarError(_clean_message(error))


def _clean_message(error: str) -> str:
    """Return the line of llguidance's message that says what is wrong."""
    first, *others = re.sub(r"\n<non-verbose/>|^at \d+\(\d+\): ", "", error).split("\n")
    told = next((line for line in others if line.startswith("error: ")), first)
    told = told.removeprefix("error: ").removeprefix("failed to compile JSON schema: ")
    return told if len(told) <= 200 else told[:200] + "…"


def _require_llguidance() -> None:
    if importlib.util.find_spec("llguidance") is None:
        hint = format_install_command("serve")
        raise GrammarError("grammars need the package llguidance, which is not installed", hint=hint)
