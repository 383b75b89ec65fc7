"""Answers that are preferred to others: pairs, ranked lists, and answers that are labelled good or bad."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ...core.data.messages import Messages, RowError
from ...core.data.rows import Fields, Record, RowFormat
from ...errors import format_names
from ..message_parsing import parse_list_or_json_array, parse_messages_and_train_mask, require_text
from ..ratings import RATING_HINT, parse_rating_or_none, suggest_rating
from .chats import parse_tools
from .classification import format_cell_for_error
from .pair_prompts import IGNORE_PROMPT_HINT, PromptWithAnswers, split_prompt_off_answers
from .texts import parse_prompt_completion_fields

ANSWER_KEYS = ("response", "content", "answer")
SCORE_KEYS = ("score", "overall_score", "rank")


def _read_preference(record: Record) -> Fields:
    columns = ("chosen", "rejected")
    found = _split_answers(record, [record[column] for column in columns], columns)
    return _make_fields(record, found) | dict(zip(columns, found.answers, strict=True))


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
        if ranked and record.get("scores") is not None:
            _require_same_order(parse_list_or_json_array(record["scores"], "scores"), values)
    else:
        answers, values, found = [], [], set()
        items = parse_list_or_json_array(record["completions"], "completions")
        for i, item in enumerate(items):
            keys = item if isinstance(item, dict) else {}
            answer, score = (next((k for k in names if k in keys), None) for names in (ANSWER_KEYS, SCORE_KEYS))
            if answer is None or score is None:
                wanted = f"an answer ({format_names(ANSWER_KEYS)}) and its score ({format_names(SCORE_KEYS)})"
                raise RowError(f"completions[{i}] has {format_names(keys) or 'no keys'}: wanted {wanted}", "bad-list")
            answers.append(keys[answer])
            values.append(keys[score])
            found.add(score)
        if all("rank" in item for item in items) and "rank" not in found:
            _require_same_order(values, [item["rank"] for item in items])
        ranked = "rank" in found
        if ranked and len(found) > 1:
            raise RowError("has completions with a rank and others with a score", "bad-list")
    scores = [_parse_score(value, i) * (-1 if ranked else 1) for i, value in enumerate(values)]
    if len(set(scores)) < 2:
        raise RowError("has no two answers with different scores: there is nothing to prefer", "tied-answers")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if isinstance(record["prompt"], str) and not all(isinstance(answer, str) for answer in answers):
        raise RowError("'prompt' is a text, and an answer is none: wanted texts, or a list of messages", "wrong-type")
    split = _split_answers(record, [answers[i] for i in order], [f"answer {i + 1}" for i in order])
    ranking: Fields = {"answers": tuple(split.answers), "scores": tuple(scores[i] for i in order)}
    return _make_fields(record, split) | ranking


def _read_unpaired_preference(record: Record) -> Fields:
    label = record["label"]
    if (is_good := parse_rating_or_none(label)) is None:
        cause = f"'label' is {format_cell_for_error(label)}{suggest_rating(label)}"
        raise RowError(cause, "bad-label", RATING_HINT)
    if not record["prompt"] or (isinstance(record["prompt"], str) and not record["prompt"].strip()):
        raise RowError("'prompt' is empty: KTO compares answers to prompts", "empty-content")
    return parse_prompt_completion_fields(record) | {"is_good": is_good}


def _parse_answer(value: Any, name: str) -> tuple[Messages | str, tuple[bool, ...]]:
    return (require_text(value, name), ()) if isinstance(value, str) else parse_messages_and_train_mask(value, name)


def _split_answers(record: Record, values: Sequence[Any], names: Sequence[str]) -> PromptWithAnswers:
    """Return the prompt and the answers of a record; raise RowError for an empty prompt, or a turn of weight 0."""
    answers, masks = zip(*map(_parse_answer, values, names), strict=True)
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        require_text(prompt, "'prompt'")
    elif prompt is not None:
        prompt, _ = parse_messages_and_train_mask(prompt, "prompt", require_trained_turn=False)
        if not prompt:
            raise RowError("'prompt' is empty", "empty-content", IGNORE_PROMPT_HINT)
    found = split_prompt_off_answers(prompt, answers, names)
    for name, own, learned in zip(names, found.answers, masks, strict=True):
        for message, is_learned in zip(own[::-1], learned[::-1], strict=False):
            if isinstance(message, dict) and message["role"] == "assistant" and not is_learned:
                cause = f"{name} has an assistant turn of weight 0: all turns of an answer are compared"
                raise RowError(cause, "bad-weight", "leave the weight out, or end the prompt after that turn")
    return found


def _make_fields(record: Record, found: PromptWithAnswers) -> Fields:
    tools = parse_tools(record.get("tools"))
    return {"messages": found.messages, "prompt": found.text, "tools": tools, "findings": found.findings}


def _require_same_order(scores: list[Any], ranks: list[Any]) -> None:
    """Raise RowError if an answer has a higher score than another, and a worse rank."""
    if any(value in (None, "") for value in [*scores, *ranks]):
        return
    pairs = [(_parse_score(s, i), _parse_score(r, i)) for i, (s, r) in enumerate(zip(scores, ranks, strict=False))]
    for (i, (score, rank)), (j, (other, other_rank)) in itertools.permutations(enumerate(pairs, 1), 2):
        if score > other and rank > other_rank:
            cause = f"answer {i} has a higher score than answer {j} ({score:g}, {other:g}) and a worse rank"
            hint = "leave out the column that is wrong (--ignore-columns), or correct the row"
            raise RowError(f"{cause} ({rank:g}, {other_rank:g}; 1 is the best)", "contradictory-rank", hint)


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
    one_of=("completions", "responses"),
)
UNPAIRED_PREFERENCE = RowFormat(
    ("prompt", "completion", "label"), ("tools",), _read_unpaired_preference, by_name_only=True
)
