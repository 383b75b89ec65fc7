"""Prompts and answers that are texts, read as a chat: the user's turn and the assistant's.

A model that is tuned from a chat base is asked through the chat template by `chat`, `serve` and what `export` writes. A
preference that was learned without it would be learned for a prompt that nobody sends.
"""

import dataclasses

from ...core.data.rows import Record, Row


def is_prompt_with_answer_texts(row: Row, record: Record) -> bool:
    """Return whether a record has a prompt and answers that are compared or rated, all of them texts.

    Texts without a prompt of their own are not divided into turns: what they share may end anywhere.
    """
    has_answers = row.chosen is not None or row.answers is not None or row.is_good is not None or row.is_prompt
    return has_answers and not row.messages and isinstance(record.get("prompt"), str)


def convert_text_row_to_chat(row: Row) -> Row:
    """Return a row of texts as one of messages; the space that plain text has before an answer is left out."""
    prompt = [{"role": "user", "content": row.prompt or ""}]
    if row.completion is not None:
        messages = [*prompt, {"role": "assistant", "content": row.completion.lstrip()}]
        return dataclasses.replace(row, messages=messages, prompt=None, completion=None)
    chosen, rejected = (text.lstrip() if isinstance(text, str) else text for text in (row.chosen, row.rejected))
    answers = None if row.answers is None else tuple(a.lstrip() if isinstance(a, str) else a for a in row.answers)
    return dataclasses.replace(row, messages=prompt, prompt=None, chosen=chosen, rejected=rejected, answers=answers)
