"""Answers that are preferred to others: pairs, ranked lists, and answers that are labelled good or bad."""

import math
from typing import Any

from ...core.data.messages import Messages, RowError
from ...core.data.rows import Fields, Record, RowFormat
from ...errors import format_names
from ..message_parsing import parse_list_or_json_array, parse_messages_and_train_mask, require_text
from .chats import parse_tools
from .classification import format_cell_for_error
from .texts import parse_prompt_completion_fields

ANSWER_KEYS = ("response", "content", "answer")
SCORE_KEYS = ("score", "overall_score", "rank")


def _read_preference(record: Record) -> Fields:
    answers = {column: _parse_answer(record[column], column) for column in ("chosen", "rejected")}
    return answers | ({"messages": []} if record.get("prompt") is None else _prompt_fields(record))


def _read_ranked_preference(record: Record) -> Fields:
    """Read answers with scores, or with ranks, of which 1 is the best."""
    if ("completions" in record) == ("responses" in record):
        given = "has 'completions' and 'responses'" if "responses" in record else "has no 'completions' or 'responses'"
        raise RowError(f"{given}: wanted one of them", "bad-list")
    if "responses" in record:
        answers, ranked = parse_list_or_json_array(record["responses"], "responses"), "rankings" in record
        column = "rankings" if ranked else "scores"
        values = parse_list_or_json_array(record.get(column), column)
        if len(values) != len(answers):
            raise RowError(f"has {len(answers)} responses and {len(values)} {column}", "bad-list")
    else:
        answers, values, found = [], [], set()
        for i, item in enumerate(parse_list_or_json_array(record["completions"], "completions")):
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


def _read_unpaired_preference(record: Record) -> Fields:
    label = record["label"]
    named = {"true": True, "false": False}.get(label.strip().casefold()) if isinstance(label, str) else label
    if not isinstance(named, bool):
        wanted = "wanted true for a good answer, false for a bad one"
        raise RowError(f"'label' is {format_cell_for_error(label)}: {wanted}", "bad-label")
    return parse_prompt_completion_fields(record) | {"is_good": named}


def _parse_answer(value: Any, name: str) -> Messages | str:
    if isinstance(value, str):
        return require_text(value, name)
    return parse_messages_and_train_mask(value, name)[0]


def _prompt_fields(record: Record) -> Fields:
    if isinstance(record["prompt"], str):
        return {"messages": [], "prompt": require_text(record["prompt"], "'prompt'")}
    messages, _ = parse_messages_and_train_mask(record["prompt"], "prompt", require_trained_turn=False)
    return {"messages": messages, "tools": parse_tools(record.get("tools"))}


def _parse_score(value: Any, number: int) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # a text, as a CSV file has it
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RowError(
            f"the score of answer {number + 1} is {format_cell_for_error(value)}: wanted a number", "bad-score"
        )
    return score


PREFERENCE = RowFormat(("chosen", "rejected"), ("prompt", "tools"), _read_preference, is_suggested=False)
RANKED_PREFERENCE = RowFormat(
    ("prompt",),
    ("completions", "responses", "scores", "rankings", "tools"),
    _read_ranked_preference,
    either=("completions", "responses"),
)
UNPAIRED_PREFERENCE = RowFormat(
    ("prompt", "completion", "label"), ("tools",), _read_unpaired_preference, by_name_only=True
)
