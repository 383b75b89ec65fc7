"""`slimtune explain`: what a code, an error or a question is about, from the pages of errors and from the docs."""

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.text import Text
from typer import Argument

from ..diagnostics.issue_trackers import make_issue_search_or_none
from ..diagnostics.knowledge import MOST_TEXT, ErrorPage, FoundAnswers, find_answers, load_error_pages, select_cases
from ..diagnostics.knowledge.guides import QuestionGuide
from ..errors import UsageError
from .common import Json, NegativeVerdictResult, make_console, make_table

_BEGINNING = 240
"""Characters of an answer's first sentences that are shown where one of several is meant."""

Words = Annotated[
    list[str] | None,
    Argument(metavar="[CODE|TEXT]", help="A code, an error, a question, or - to read the standard input."),
]


@dataclass(frozen=True)
class PageTitle:
    """A page that explains an error."""

    code: str
    """Its code, which the error names."""
    title: str
    """What it is about."""


@dataclass(frozen=True)
class ErrorPagesResult:
    """What `explain --json` prints without a text."""

    pages: list[PageTitle]
    """All pages."""


@dataclass(frozen=True)
class ExplainResult:
    """What `slimtune explain TEXT --json` prints if a page is about the text."""

    code: str
    """The page's code."""
    title: str
    """What it is about."""
    text: str
    """The page in Markdown: cause, check and fix."""
    cases: list[str]
    """The parts of its fix that begin with a message that is part of the text."""
    nearest: list[PageTitle]
    """Other pages that may be meant."""
    guides: list[QuestionGuide]
    """Empty: the text is an error."""
    related: list[str]
    """Headings of the docs that may be meant; `explain HEADING` prints what is under one."""


@dataclass(frozen=True)
class NoPageResult:
    """What `slimtune explain TEXT --json` prints if no page of an error is surely about the text."""

    code: None
    """No page."""
    nearest: list[PageTitle]
    """Pages that may be meant."""
    guides: list[QuestionGuide]
    """What surely answers the text if it is a question and no error."""
    alternatives: list[str]
    """Codes and headings of up to five answers, of which one is probably meant, the nearest first; empty if `guides`
    is not, or if nothing is probably meant, with exit code 1."""
    related: list[str]
    """Headings of the docs that may be meant; `explain HEADING` prints what is under one."""
    issue_search: str | None
    """The address of a search among the reports of the program in whose code the error was raised."""


def explain_error(
    text: Words = None, as_json: Json = False
) -> ErrorPagesResult | ExplainResult | NoPageResult | NegativeVerdictResult:
    """Explain an error: its cause, how to check it, and what mends it.

    CODE is what an error names in its last line. TEXT is any error or question; a pasted traceback finds its page.
    Without both, all pages are listed. Exit code 1 if nothing probably answers it.
    """
    words = " ".join(text or [])
    if words == "-":
        words = sys.stdin.read()[-MOST_TEXT:]
        if not words.strip():
            raise UsageError("the standard input is empty", "the text of an error", "slimtune explain - < log.txt")
    if not words.strip():
        pages = list(load_error_pages().values())
        if not as_json:
            make_console().print(
                make_table("", "", text_column_indices=(1,), rows=[(page.code, page.title) for page in pages])
            )
        return ErrorPagesResult(_list_titles(pages))
    answers = find_answers(words)
    nearest = _list_titles([each for each in answers.near if isinstance(each, ErrorPage)])
    related = [each.answer for each in answers.near if isinstance(each, QuestionGuide)]
    if not as_json:
        _print_answers(answers, words)
    if isinstance(answers.sure, ErrorPage):
        cases = list(select_cases(answers.sure, words).cases)
        return ExplainResult(answers.sure.code, answers.sure.title, answers.sure.body, cases, nearest, [], related)
    guides = [answers.sure] if answers.sure else []
    alternatives = [each.name for each in answers.probable]
    result = NoPageResult(None, nearest, guides, alternatives, related, make_issue_search_or_none(words))
    return result if guides or answers.probable else NegativeVerdictResult(result)


def _list_titles(pages: list[ErrorPage]) -> list[PageTitle]:
    return [PageTitle(page.code, page.title) for page in pages]


def _print_answers(answers: FoundAnswers, text: str) -> None:
    screen = make_console()
    if answers.sure:
        _print_answer(screen, answers.sure, text)
    elif answers.probable:
        screen.print("The answer is probably one of these, the nearest first.")
        for each in answers.probable:
            screen.print()
            _print_beginning(screen, each, text)
        screen.print("\n`slimtune explain HEADING`, or a page's code, prints all of one.")
    elif answers.near:
        screen.print(Text("nothing answers this exactly; nearest:", "bold"))
    else:
        screen.print(Text("no page is about this; `slimtune explain` lists them.", "bold"))
    if answers.near and (answers.sure or answers.probable):
        screen.print(Text("\nSee also", "bold"))
    _print_names(screen, answers.near, with_summary=not answers.sure)
    if not answers.sure and (search := make_issue_search_or_none(text)):
        screen.print("\nOthers' reports of this error:", search, soft_wrap=True)


def _print_answer(screen: Console, answer: ErrorPage | QuestionGuide, text: str) -> None:
    """Print all that an answer says about a text."""
    if isinstance(answer, ErrorPage):
        page = select_cases(answer, text)
        screen.print(Text(f"{answer.code}: {answer.title}", "bold"))
        _print_markdown(screen, page.body)
        if page.number_left_out:
            cases = "1 case" if page.number_left_out == 1 else f"{page.number_left_out} cases"
            screen.print(f"\n{cases} of other messages: `slimtune explain {answer.code}`")
    elif "\n" in answer.what:
        screen.print(Text(answer.answer, "bold"))
        _print_markdown(screen, answer.what)
    else:
        _print_markdown(screen, f"{answer.answer}{'' if answer.answer[-1] in '?.' else ':'} {answer.what}")


def _print_beginning(screen: Console, answer: ErrorPage | QuestionGuide, text: str) -> None:
    """Print an answer's heading, and the cases that are about a text or else its first sentences."""
    if isinstance(answer, ErrorPage):
        heading, told = f"{answer.code}: {answer.title}", answer.body.removeprefix("## Cause\n")
        cases = select_cases(answer, text).cases
    else:
        heading, told, cases = answer.answer, answer.what, ()
    first, *others = re.split(r"(?<=[.?!])\s", told.strip().partition("\n\n")[0])
    for sentence in others:
        if len(first) + len(sentence) > _BEGINNING:
            break
        first += f" {sentence}"
    screen.print(Text(heading, "bold"))
    _print_markdown(screen, "\n".join(cases) or first)


def _print_names(screen: Console, answers: Sequence[ErrorPage | QuestionGuide], with_summary: bool) -> None:
    names = [
        (f"  {each.code}", each.title) if isinstance(each, ErrorPage)
        else (f"  {each.answer}", re.split(r"(?<=[.:])\s", each.what, maxsplit=1)[0] if with_summary else "")
        for each in answers
    ]  # fmt: skip
    if names:
        screen.print(make_table("", "", text_column_indices=(1,), rows=names))


def _print_markdown(screen: Console, text: str) -> None:
    """Print a page of Markdown; a command, a table or an address stays in one line, so that it can be copied."""
    is_code = False
    for line in text.splitlines():
        if line.startswith("```"):
            is_code = not is_code
        elif line.startswith("## ") and not is_code:
            screen.print(Text(line[3:], "bold"))
            if line == "## Fix" and "slimtune train …" in text:
                screen.print("… stands for your recipe, or for the flags of your command.")
        elif is_code or line.startswith(("    ", "|")):
            screen.print(f"    {line}" if is_code else line, soft_wrap=True)
        else:
            line = re.sub(r"<(http[^>]*)>", r"\1", line)
            line = re.sub(r"(?<![\w(])\*\*([^*]+)\*\*", r"\1", line)  # not the two stars of `model.generate(**inputs)`
            width = screen.width if screen.is_terminal else max(len(line), 1)
            lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
            screen.print("\n".join(lines), soft_wrap=True)
