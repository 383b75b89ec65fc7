"""The formats of a row, each recognized by its columns, and how a record of each becomes a `Row`.

A new format is one function here and one entry in `FORMATS`. Columns that no format names are not used; the data
report names them, and one of `COLUMN_MEANINGS` is an error.
"""

import contextlib
import difflib
import math
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.data.messages import (
    Messages,
    RowError,
    check_depth,
    convert_sharegpt,
    json_type,
    parse_messages_and_train_mask,
    require_list,
    require_text,
)
from ..core.foundation.sequences import common_prefix_length
from ..errors import DataError, UsageError, format_names, nearest

Record = Mapping[str, Any]
Fields = dict[str, Any]  # of a `Row`


@dataclass(frozen=True)
class Row:
    """One row: a conversation, a text, or a prompt with its answers."""

    messages: Messages  # the conversation, or the prompt of a preference pair; empty for a row of texts
    line: int  # in the file (JSONL, CSV, text), or the number of the item, from 1
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions that the assistant may call
    learned: tuple[bool, ...] | None = None  # for each message whether it is learned; None: every assistant turn is
    prompt: str | None = None  # the text before the completion; it is not learned
    completion: str | None = None  # the text that is learned
    chosen: Messages | str | None = None  # the better answer of a preference pair
    rejected: Messages | str | None = None
    answers: tuple[Messages | str, ...] | None = None  # of a ranked list, the best first
    scores: tuple[float, ...] | None = None  # of the answers, higher is better
    is_good: bool | None = None  # whether the answer is good, by its label; None: it has no label
    labels: tuple[str, ...] | None = None  # the classes that the messages, or the prompt, belong to: one, or any number
    file: str | None = None  # its name, if rows come from several

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of its labels: its classes, or "True" for a good answer, "False" for a bad one; None: no label."""
        return self.labels if self.is_good is None else (str(self.is_good),)


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used: what is wrong, and the kind of error in kebab case; `line` and `file` as for `Row`."""

    line: int
    cause: str
    code: str
    file: str | None = None
    hint: str = ""  # what to do, if it is more than to repair or remove the row


def _read_chat(record: Record) -> Fields:
    return _chat_fields(record, *parse_messages_and_train_mask(record["messages"]))


def _read_sharegpt(record: Record) -> Fields:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages = [*system, *convert_sharegpt(record["conversations"])]
    return _chat_fields(record, *parse_messages_and_train_mask(messages, "conversations"))


def _read_instruction(record: Record) -> Fields:
    instruction = require_text(record["instruction"], "'instruction'")
    given = require_text(record.get("input") or "", "'input'", allow_empty=True)
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction},
        {"role": "assistant", "content": require_text(record["output"], "'output'")},
    ]
    if system := record.get("system"):
        messages.insert(0, {"role": "system", "content": require_text(system, "'system'")})
    return {"messages": messages}


def _read_prompt_completion(record: Record) -> Fields:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        completion = require_text(completion, "'completion'")
        return {"messages": [], "prompt": require_text(prompt, "'prompt'", allow_empty=True), "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError("'prompt' and 'completion' are a text and a list: wanted two texts or two lists", "wrong-type")
    before, _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
    after, learned = parse_messages_and_train_mask(completion, "completion")
    return _chat_fields(record, before + after, (False,) * len(before) + learned)


def _read_unpaired_preference(record: Record) -> Fields:
    label = record["label"]
    named = {"true": True, "false": False}.get(label.strip().casefold()) if isinstance(label, str) else label
    if not isinstance(named, bool):
        wanted = "wanted true for a good answer, false for a bad one"
        raise RowError(f"'label' is {_show_cell(label)}: {wanted}", "bad-label")
    return _read_prompt_completion(record) | {"is_good": named}


def _read_text(record: Record) -> Fields:
    return {"messages": [], "completion": require_text(record["text"], "'text'")}


def _read_preference(record: Record) -> Fields:
    answers = {column: _parse_answer(record[column], column) for column in ("chosen", "rejected")}
    return answers | ({"messages": []} if record.get("prompt") is None else _prompt_fields(record))


def _parse_answer(value: Any, name: str) -> Messages | str:
    if isinstance(value, str):
        return require_text(value, name)
    return parse_messages_and_train_mask(value, name)[0]


def _prompt_fields(record: Record) -> Fields:
    if isinstance(record["prompt"], str):
        return {"messages": [], "prompt": require_text(record["prompt"], "'prompt'")}
    messages, _ = parse_messages_and_train_mask(record["prompt"], "prompt", require_trained_turn=False)
    return {"messages": messages, "tools": read_tools(record.get("tools"))}


ANSWER_KEYS = ("response", "content", "answer")
SCORE_KEYS = ("score", "overall_score", "rank")


def _read_ranked_preference(record: Record) -> Fields:
    """Read answers with scores, or with ranks, of which 1 is the best."""
    if ("completions" in record) == ("responses" in record):
        given = "has 'completions' and 'responses'" if "responses" in record else "has no 'completions' or 'responses'"
        raise RowError(f"{given}: wanted one of them", "bad-list")
    if "responses" in record:
        answers, ranked = require_list(record["responses"], "responses"), "rankings" in record
        column = "rankings" if ranked else "scores"
        values = require_list(record.get(column), column)
        if len(values) != len(answers):
            raise RowError(f"has {len(answers)} responses and {len(values)} {column}", "bad-list")
    else:
        answers, values, found = [], [], set()
        for i, item in enumerate(require_list(record["completions"], "completions")):
            keys = item if isinstance(item, dict) else {}
            answer, score = (next((k for k in names if k in keys), None) for names in (ANSWER_KEYS, SCORE_KEYS))
            if answer is None or score is None:
                wanted = f"an answer ({format_names(ANSWER_KEYS)}) and its score ({format_names(SCORE_KEYS)})"
                raise RowError(f"completions[{i}] has {format_names(keys) or 'no keys'}: wanted {wanted}", "bad-list")
            answers.append(keys[answer])
            values.append(keys[score])
            found.add(score)
        ranked = "rank" in found
        if ranked and len(found) > 1:
            raise RowError("has completions with a rank and others with a score", "bad-list")
    scores = [_parse_score(value, i) * (-1 if ranked else 1) for i, value in enumerate(values)]
    if len(set(scores)) < 2:
        raise RowError("has no two answers with different scores: there is nothing to prefer", "tied-answers")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if isinstance(record["prompt"], str) and not all(isinstance(answer, str) for answer in answers):
        raise RowError("'prompt' is a text, and an answer is none: wanted texts, or a list of messages", "wrong-type")
    parsed = [_parse_answer(answer, f"answer {i}") for i, answer in enumerate(answers, 1)]
    ranking: Fields = {"answers": tuple(parsed[i] for i in order), "scores": tuple(scores[i] for i in order)}
    return ranking | _prompt_fields(record)


def _parse_score(value: Any, number: int) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # a text, as a CSV file has it
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RowError(f"the score of answer {number + 1} is {_show_cell(value)}: wanted a number", "bad-score")
    return score


def _show_cell(value: Any) -> str:
    return "empty" if value in (None, "", {}) else f"{json_type(value)}: {str(value)[:40]}"


def split_answers(row: Row) -> list[Row]:
    """Return the answers of a preference pair, or of a ranked list, as rows, the best first; any other row as it is.

    The prompt is what both answers begin with, if it is not given apart (TRL's implicit prompt): whole messages, or a
    text up to the last space. Only what follows the prompt is learned.
    """
    answers = row.answers
    if row.chosen is not None and row.rejected is not None:
        answers = (row.chosen, row.rejected)
    if answers is None:
        return [row]
    single = replace(row, chosen=None, rejected=None, answers=None, scores=None)
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) == len(answers) and not row.messages:
        if row.prompt is not None:
            return [replace(single, completion=text) for text in texts]
        shared = common_prefix_length(texts[0], texts[1])
        shared -= shared > 0 and texts[0][shared - 1] == " "
        return [replace(single, prompt=text[:shared], completion=text[shared:]) for text in texts]
    chats: list[Messages] = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
    shared = common_prefix_length(chats[0], chats[1])
    if row.messages and chats[0][: len(row.messages)] != row.messages:  # otherwise the answers repeat the prompt
        chats, shared = [[*row.messages, *chat] for chat in chats], len(row.messages)
    return [
        replace(
            single,
            messages=chat,
            prompt=None,
            learned=tuple(i >= shared and m["role"] == "assistant" for i, m in enumerate(chat)),
        )
        for chat in chats
    ]


def _read_classification(record: Record) -> Fields:
    if ("text" in record) == ("messages" in record):
        raise RowError("has 'text' and 'messages'" if "text" in record else "has no 'text' or 'messages'", "bad-text")
    label = record["label"]
    if isinstance(label, str) and label.lstrip().startswith("["):
        label = require_list(label, "label")  # as a CSV file has it
    labels = tuple(parse_label(name) for name in (label if isinstance(label, list) else [label]))
    if len(set(labels)) < len(labels):
        raise RowError(f"names a label twice: {format_names(labels)}", "bad-label")
    fields: Fields = {"messages": [], "labels": labels}
    if "text" in record:
        return fields | {"prompt": require_text(record["text"], "'text'")}
    fields["messages"], _ = parse_messages_and_train_mask(record["messages"], require_trained_turn=False)
    if not fields["messages"]:
        raise RowError("'messages' is empty", "empty-content")
    return fields | {"tools": read_tools(record.get("tools"))}


def sort_labels(names: Iterable[str]) -> list[str]:
    """Return the names of classes, each once, in the order of their ids: sorted, numbers by their value."""
    unique = set(names)
    numbers = all(name.isdecimal() for name in unique)
    return sorted(unique, key=lambda name: (int(name) if numbers else 0, name))


def parse_label(value: Any) -> str:
    """Return the name of a class: a text, an integer or a boolean; raise RowError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with gaps is read as one of floats
    if isinstance(value, str) and value.strip():
        return require_text(value, "'label'").strip()
    if isinstance(value, bool | int):
        return str(value)
    raise RowError(f"'label' is {_show_cell(value)}: wanted the name or the number of a class", "bad-label")


def _chat_fields(record: Record, messages: Messages, learned: tuple[bool, ...]) -> Fields:
    every_turn = tuple(m["role"] == "assistant" for m in messages)
    return {
        "messages": messages,
        "learned": None if learned == every_turn else learned,
        "tools": read_tools(record.get("tools")),
    }


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of functions as OpenAI writes them, None for no tools; raise RowError for a wrong one."""
    if value is None or value in ("", []):
        return None
    tools = require_list(value, "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{i}] is not the JSON schema of a function: it has no name", "bad-tool")
        check_depth(tool, f"tools[{i}]")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


@dataclass(frozen=True)
class Format:
    """The columns of a format, and the function that turns a record into fields of `Row`."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Record], Fields]
    either: tuple[str, ...] = ()  # of these optional columns rows have one

    def __str__(self) -> str:
        return ", ".join([*self.required, *([" or ".join(self.either)] if self.either else [])])

    def fits(self, present: Collection[str]) -> bool:
        """Return whether these columns are those of the format."""
        return set(self.required) <= set(present) and (not self.either or not set(self.either).isdisjoint(present))


FORMATS = {
    "chat": Format(("messages",), ("tools",), _read_chat),
    "instruction": Format(("instruction", "output"), ("input", "system"), _read_instruction),
    "sharegpt": Format(("conversations",), ("system", "tools"), _read_sharegpt),
    "prompt-completion": Format(("prompt", "completion"), ("tools",), _read_prompt_completion),
    "text": Format(("text",), (), _read_text),
    "document": Format(("text",), (), _read_text),
    "preference": Format(("chosen", "rejected"), ("prompt", "tools"), _read_preference),
    "ranked-preference": Format(
        ("prompt",),
        ("completions", "responses", "scores", "rankings", "tools"),
        _read_ranked_preference,
        ("completions", "responses"),
    ),
    "unpaired-preference": Format(("prompt", "completion", "label"), ("tools",), _read_unpaired_preference),
    "classification": Format(("label",), ("text", "messages", "tools"), _read_classification),
}
NAMED_FORMATS = ("unpaired-preference", "classification", "document")
"""Formats that are not recognized by their columns: a `label` may be a class or rate a text, and a document is a text,
too."""


def parse_record(record: Record, format: str, line: int, file: str | None = None) -> Row | InvalidRow:
    """Return a record as a row of a format, or what is wrong with it."""
    try:
        for column in FORMATS[format].required:
            if column not in record:
                present = f"(keys here: {format_names(record) or 'none'})"
                raise RowError(f"has no {column!r}{nearest(column, record)} {present}", "missing-column")
        return Row(line=line, file=file, **FORMATS[format].read(record))
    except RowError as error:
        return InvalidRow(line, str(error), error.code, file, error.hint)


_RATED = "rows that it rates low would be learned like the others"
_MEDIA = "only text is learned"
_TREE = "each row is one message of a conversation, not a text of its own"
_CONTEXT = "the model would not read it"
COLUMN_MEANINGS = {
    **dict.fromkeys(("label", "labels", "score", "scores", "rating", "ratings", "reward", "rewards"), _RATED),
    **dict.fromkeys(("weight", "weights"), "every row would count the same"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("role", "parent_id"), _TREE),
    **dict.fromkeys(("chosen", "rejected"), "preference pairs have it"),
    **dict.fromkeys(("system", "system_prompt", "tools", "functions", "history", "context", "documents"), _CONTEXT),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "the model would not learn it"),
}
"""Columns without which a row means something else, and what would happen to the rows without them."""
PARTNER_COLUMNS = {
    "text": ("prompt", "question", "instruction", "input", "answer", "response", "output", "completion", "target",
             "summary"),
    "prompt-completion": ("input",),
}  # fmt: skip
"""By format, columns that belong to the recognized one; a format that is given by name may leave them out."""
COLUMN_SYNONYMS = {
    "messages": ("dialog", "dialogue", "conversation", "chat", "turns"),
    "instruction": ("prompt", "question", "query", "problem", "user"),
    "input": ("context", "passage"),
    "output": ("response", "answer", "completion", "reply", "solution", "assistant", "summary"),
    "completion": ("response", "answer", "output", "reply"),
    "text": ("content", "document", "body"),
}
"""By role, other names that people give to its column; `suggest_flags` proposes them, nothing is taken by guess."""


@dataclass(frozen=True)
class ColumnChoice:
    """How the columns of a file are read: renamed (role → column) and left out (a column, or `messages.key`)."""

    columns: Mapping[str, str]
    ignored: Collection[str] = ()

    def apply(self, record: Record) -> Record:
        """Return a record with its columns renamed; one that already has a role's name is dropped."""
        if not self.columns and not self.ignored:
            return record
        taken = {*self.columns, *self.columns.values(), *self.ignored}
        rest = {k: v for k, v in record.items() if k not in taken}
        chosen = rest | {role: record[column] for role, column in self.columns.items() if column in record}
        for name in self.ignored:
            column, dot, key = name.partition(".")
            if dot and column in chosen:
                with contextlib.suppress(RowError):  # `parse_record` says it
                    chosen[column] = [_drop_key(turn, key) for turn in require_list(chosen[column], column)]
        return chosen

    def find_unused(self, present: Iterable[str], format: str) -> tuple[str, ...]:
        """Return those of a record's columns that a format does not use and that are not left out by name."""
        known = FORMATS[format]
        used = {self.columns.get(role, role) for role in (*known.required, *known.optional)}
        return tuple(column for column in present if column not in used and column not in self.ignored)


def _drop_key(turn: Any, key: str) -> Any:
    """Return a message without a key; role and content stay, and the name of a tool that returned a result."""
    if not isinstance(turn, dict) or key in ("role", "content"):
        return turn
    if turn.get("role") == "tool" and key in ("name", "tool_call_id"):
        return turn
    return {k: v for k, v in turn.items() if k != key}


def explain_loss(column: str, format: str, given: bool) -> str:
    """Return how rows of a format change without a column; empty: it is metadata.

    `given`: the format was named, not recognized from the columns.
    """
    name = column.casefold()
    partner = not given and name in PARTNER_COLUMNS.get(format, ())
    return COLUMN_MEANINGS.get(name, "") or ("it seems to belong to each text" if partner else "")


def validate_format_options(format: str | None, columns: Mapping[str, str]) -> None:
    """Raise UsageError for an unknown format, or for a role of `--column` that the format does not have."""
    if format is not None and format not in FORMATS:
        problem = f"there is no data format {format!r}{nearest(format, FORMATS)}"
        raise UsageError(problem, f"one of {format_names(FORMATS)}", "see docs/data.md")
    formats = FORMATS.values() if format is None else [FORMATS[format]]
    roles = list(dict.fromkeys(column for f in formats for column in (*f.required, *f.optional)))
    for role, column in columns.items():
        if role not in roles:
            owner = f"the format {format}" if format else "any format"
            problem = f"--column {role}={column}: {role!r} is not a column of {owner}{nearest(role, roles)}"
            raise UsageError(problem, f"ROLE=COLUMN, with a role of {format_names(roles, most=20)}")


def detect_format(path: Path, records: Iterable[Record], choice: ColumnChoice, format: str | None = None) -> str:
    """Return the format of a file from its first records; if it is given, only the renamed columns are checked.

    Raise UsageError if no record has a renamed column (role → column), DataError if no format fits, or several do.
    """
    records = list(records)
    present = list(dict.fromkeys(key for record in records for key in record))
    for role, column in choice.columns.items():
        if column not in present:
            problem = f"--column {role}={column}: {path} has no column {column!r}{nearest(column, present)}"
            raise UsageError(problem, f"one of {format_names(present)}")
    if format is not None:
        return format
    records = list(map(choice.apply, records))
    present = list(dict.fromkeys(key for record in records for key in record))
    fitting = [n for n, f in FORMATS.items() if n not in NAMED_FORMATS and f.fits(present)]
    if len(fitting) > 1:  # a misspelled column in one row is the fault of that row, which reading names
        most = [n for n in fitting if 2 * sum(FORMATS[n].fits(list(record)) for record in records) > len(records)]
        fitting = most or fitting
    if len(fitting) == 2 and "text" in fitting:  # Alpaca's own rows: the text repeats the other columns
        (other,) = set(fitting) - {"text"}
        if all(_is_rendering(record, other) for record in records):
            return other
    if len(fitting) == 1:
        return fitting[0]
    columns_of_formats = "; ".join(f"{name}: {f}" for name, f in FORMATS.items())
    expected = f"the columns of one format ({columns_of_formats})"
    if fitting:
        problem = f"{path} may be {' or '.join(fitting)}: its rows have {format_names(present)}"
        raise DataError(problem, expected, f"--format {fitting[0]}, or another of them")
    flags, misspelled = suggest_flags(present)
    hints = "".join(f"; did you mean {role!r} for {column!r}?" for role, column in misspelled)
    problem = f"{path} has no known format: its rows have {format_names(present) or 'no columns'}{hints}"
    hint = "name its columns: --column messages=COLUMN, or --column instruction=COLUMN --column output=COLUMN …"
    raise DataError(problem, expected, f"try {', or '.join(flags)}" if flags else hint)


def suggest_flags(present: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return flags with which rows of these columns have a format, and columns that are misspelled (role, column)."""
    names = {column.casefold(): column for column in present}
    flags: list[str] = []
    misspelled: list[tuple[str, str]] = []
    for name, f in FORMATS.items():
        if f.either:
            continue
        found: dict[str, str] = {}
        for role in (*f.required, *f.optional):
            known = next((n for n in (role, *COLUMN_SYNONYMS.get(role, ())) if n in names), None)
            if known is not None:
                found[role] = names[known]
            elif close := difflib.get_close_matches(role, names, 1, 0.8):
                found[role] = names[close[0]]
                misspelled.append((role, found[role]))
        if name not in ("preference", *NAMED_FORMATS) and set(f.required) <= set(found):
            pairs = [f"{role}={column}" for role, column in found.items() if role != column]
            note = {"instruction": " (a chat)", "prompt-completion": " (texts without a chat template)"}.get(name, "")
            flags.append(" ".join([f"--format {name}", *(f"--column {shlex.quote(pair)}" for pair in pairs)]) + note)
    return flags, list(dict.fromkeys(misspelled))


def _is_rendering(record: Record, format: str) -> bool:
    """Return whether the `text` of a record contains every text of its row in another format."""
    row, text = parse_record(record, format, 1), record.get("text")
    if isinstance(row, InvalidRow) or not isinstance(text, str):
        return False
    texts = [row.prompt or "", row.completion or "", *(m["content"] for m in row.messages)]
    parts = [part.strip() for whole in texts for part in whole.split("\n\n")]  # an input stands apart in `text`
    return any(parts) and all(part in text for part in parts)
