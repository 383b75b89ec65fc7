"""Which part of the answers of a pair, or of a ranked list, is their prompt: each answer is read by itself.

    prompt [u]       answers [u, a] and [b]        the first answer repeats the prompt, which is split off it alone
    prompt [s, u]    answers [u, a] and [u, b]     both repeat the end of the prompt
    no prompt        answers [u, a] and [u, b]     the prompt is what they all begin with (TRL's implicit prompt)

Of messages it is certain what is repeated, because the roles show it. Of texts it is not, so that they get a finding.
TRL never looks whether a `prompt` column is repeated: it renders [u, u, a]; and it compares [u, a] with [other u, b].
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...core.data.messages import Messages, RowError
from ...core.foundation.sequences import count_common_prefix

Finding = tuple[str, str]
"""A code of the data report's `FINDING_TYPES`, and an example."""
SHOWN_CHARACTERS = 40
SAME_PROMPT_HINT = (
    "write the same prompt before each answer; without a 'prompt' column, both answers of a pair must begin with it"
)
IGNORE_PROMPT_HINT = "if both answers of a pair contain the whole prompt: --ignore-columns prompt (data.ignore_columns)"


class PromptWithAnswers(NamedTuple):
    """The prompt of a pair or a list, as messages or as a text, and the answers without it."""

    messages: Messages
    text: str | None
    answers: list[Messages | str]
    findings: tuple[Finding, ...] = ()


def split_prompt_off_answers(
    prompt: Messages | str | None, answers: Sequence[Messages | str], names: Sequence[str]
) -> PromptWithAnswers:
    """Return the prompt of answers, and what follows it in each; `names` are what errors call them.

    Raises:
        RowError: the answers belong to different prompts, or it cannot be known what their prompt is.
    """
    texts = [answer for answer in answers if isinstance(answer, str)]
    if isinstance(prompt, str | None) and len(texts) == len(answers):
        return _split_texts(prompt, texts, names)
    chats: list[Messages] = [[{"role": "assistant", "content": a}] if isinstance(a, str) else a for a in answers]
    if isinstance(prompt, str | None):
        found = _split_shared_messages(chats, names)
        if prompt is not None:
            _require_prompt_among_messages(prompt, found.messages)
        return found
    return _split_given_messages(prompt, answers, chats, names)


def remove_repeated_prompt(prompt: Messages, chat: Messages, name: str) -> Messages:
    """Return a conversation without the messages at its begin that end its prompt: all of the prompt, or the last ones.

    Raises:
        RowError: nothing is left, or what is left begins with another question; `name` is what the error calls it.
    """
    sizes = range(min(len(prompt), len(chat)), 0, -1)
    own = chat[next((n for n in sizes if prompt[-n:] == chat[:n]), 0) :]
    if not own:
        raise RowError(f"{name} is the prompt alone, without an answer", "empty-answer")
    role = own[0]["role"]
    if prompt and (role in ("system", "developer") or (role == "user" and prompt[-1]["role"] == "user")):
        cause = f"{name} begins with a {role} message that is not in the prompt: {_show(own, 0)}"
        raise RowError(cause, "different-prompts", f"{SAME_PROMPT_HINT}; {IGNORE_PROMPT_HINT}")
    return own


def answer_begins_with_prompt(prompt: str, answer: str) -> bool:
    """Return whether an answer begins with the words of its prompt."""
    words, answer = prompt.strip(), answer.lstrip()
    following = answer[len(words) : len(words) + 1]
    return bool(words) and answer.startswith(words) and not (words[-1].isalnum() and following.isalnum())


def _split_texts(prompt: str | None, texts: list[str], names: Sequence[str]) -> PromptWithAnswers:
    if prompt is None:
        size = _count_shared_characters(texts)
        findings = () if size else (("no-prompt", ""),)
        return PromptWithAnswers([], texts[0][:size], [text[size:] for text in texts], findings)
    repeated = [answer_begins_with_prompt(prompt, text) for text in texts]
    if not any(repeated):
        return PromptWithAnswers([], prompt, [*texts])
    example = repr(prompt[:SHOWN_CHARACTERS])
    if all(repeated) and all(text.startswith(prompt) for text in texts):
        own = [text[len(prompt) :] for text in texts]
        for name, text in zip(names, own, strict=True):
            if not text.strip():
                raise RowError(f"{name} is the prompt alone, without an answer", "empty-answer")
        return PromptWithAnswers([], prompt, [*own], (("repeated-prompt", example),))
    return PromptWithAnswers([], prompt, [*texts], (("prompt-in-answer", f"{names[repeated.index(True)]}: {example}"),))


def _count_shared_characters(texts: list[str]) -> int:
    """Return the characters that all texts begin with, up to a space: no word is divided.

    A token that is partly prompt and partly answer would not be learned. The space before the answer is the answer's.
    """
    shared = min(count_common_prefix(texts[0], text) for text in texts)
    while shared and not texts[0][shared - 1].isspace():
        if all(text[shared : shared + 1].isspace() and text[shared:].strip() for text in texts):
            break
        shared -= 1
    return shared - (shared > 0 and texts[0][shared - 1] == " ")


def _split_shared_messages(chats: list[Messages], names: Sequence[str]) -> PromptWithAnswers:
    """Return what all conversations begin with as their prompt."""
    shared = min(count_common_prefix(chats[0], chat) for chat in chats)
    if all(len(chat) == shared for chat in chats):  # equal answers, which their tokens will show
        shared = max(i for i, message in enumerate(chats[0]) if message["role"] == "assistant")
    return _make_checked_prompt(chats, shared, names)


def _split_given_messages(
    prompt: Messages, answers: Sequence[Messages | str], chats: list[Messages], names: Sequence[str]
) -> PromptWithAnswers:
    """Return a prompt that is given apart, and conversations without the part of it that they repeat."""
    own = [remove_repeated_prompt(prompt, chat, name) for name, chat in zip(names, chats, strict=True)]
    shared = min(count_common_prefix(own[0], chat) for chat in own)
    asked = next((i for i in range(shared) if own[0][i]["role"] == "assistant"), shared)
    found = _make_checked_prompt([[*prompt, *chat] for chat in own], len(prompt) + asked, names)
    texts = [answer for answer in answers if isinstance(answer, str)]
    if len(texts) < len(answers):
        return found
    question = prompt[-1].get("content") or ""
    repeated = [name for name, text in zip(names, texts, strict=True) if answer_begins_with_prompt(question, text)]
    quoted = [("prompt-in-answer", f"{repeated[0]}: {question[:SHOWN_CHARACTERS]!r}")] if repeated else []
    return found._replace(answers=[*texts], findings=(*found.findings, *quoted))


def _make_checked_prompt(chats: list[Messages], size: int, names: Sequence[str]) -> PromptWithAnswers:
    """Return the first messages of conversations as their prompt; raise RowError unless the assistant follows it."""
    for name, chat in zip(names, chats, strict=True):
        if len(chat) == size:
            raise RowError(f"{name} has no message of its own after the prompt that they share", "empty-answer")
    strange = [(name, chat) for name, chat in zip(names, chats, strict=True) if chat[size]["role"] != "assistant"]
    if strange:
        shown = " and ".join(f"{name} has {_show(chat, size)}" for name, chat in zip(names[:2], chats, strict=False))
        cause = f"the answers belong to different prompts: at messages[{size}], {shown}"
        raise RowError(cause, "different-prompts", SAME_PROMPT_HINT)
    said = [[m for m in chat[size:] if m["role"] not in ("assistant", "tool")] for chat in chats]
    findings = [("different-turns", "")] if any(turns != said[0] for turns in said) else []
    if not size:
        findings.append(("no-prompt", ""))
    return PromptWithAnswers(chats[0][:size], None, [chat[size:] for chat in chats], tuple(findings))


def _require_prompt_among_messages(prompt: str, messages: Messages) -> None:
    """Raise RowError unless a text beside conversations is one of the turns that they share."""
    said = [" ".join(message["content"].casefold().split()) for message in messages if message["role"] != "assistant"]
    if " ".join(prompt.casefold().split()) not in said:
        cause = (
            f"'prompt' is a text ({prompt[:SHOWN_CHARACTERS]!r}), and no turn that the answers begin with is that text"
        )
        raise RowError(cause, "different-prompts", IGNORE_PROMPT_HINT)


def _show(chat: Messages, index: int) -> str:
    return f"{chat[index]['role']} {chat[index].get('content', '')[:SHOWN_CHARACTERS]!r}"
