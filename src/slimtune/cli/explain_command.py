"""`slimtune explain`: what a code, an error or a question is about, from the pages in `slimtune/knowledge`."""

import sys
from dataclasses import dataclass
from typing import Annotated

from rich.text import Text
from typer import Argument

from ..diagnostics.knowledge import MOST_TEXT, ErrorPage, is_answered_and_list_nearest_pages, load_error_pages
from ..diagnostics.knowledge.guides import QuestionGuide, find_command_guides
from ..errors import UsageError
from .common import Json, NegativeVerdictResult, make_console, make_table

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
    nearest: list[PageTitle]
    """Other pages that may be meant."""
    guides: list[QuestionGuide]
    """Empty: the text is an error."""


@dataclass(frozen=True)
class NoPageResult:
    """What `slimtune explain TEXT --json` prints if no page is about the text."""

    code: None
    """No page."""
    nearest: list[PageTitle]
    """Pages that may be meant."""
    guides: list[QuestionGuide]
    """What answers the text if it is a question and no error."""


def explain_error(
    text: Words = None, as_json: Json = False
) -> ErrorPagesResult | ExplainResult | NegativeVerdictResult:
    """Explain an error: its cause, how to check it, and what mends it.

    CODE is what an error names in its last line. TEXT is any error or question; a pasted traceback finds its page.
    Without both, all pages are listed. Exit code 1 if no page is about it.
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
    found, nearest = is_answered_and_list_nearest_pages(words)
    page, others = (nearest[0], nearest[1:]) if found else (None, nearest)
    guides = [] if found else find_command_guides(words)
    if not as_json:
        _print_answer(page, others, guides)
    if page is None:
        return NegativeVerdictResult(NoPageResult(None, _list_titles(others), guides))
    return ExplainResult(page.code, page.title, page.body, _list_titles(others), guides)


def _list_titles(pages: list[ErrorPage]) -> list[PageTitle]:
    return [PageTitle(page.code, page.title) for page in pages]


def _print_answer(page: ErrorPage | None, others: list[ErrorPage], guides: list[QuestionGuide]) -> None:
    screen = make_console()
    if guides:
        screen.print(Text("This is not an error. What answers it:", "bold"))
        for guide in guides:
            screen.print(Text(f"  {guide.answer}{'' if guide.answer.endswith('?') else ':'} {guide.what}"))
    elif page is None:
        nearest = ". The nearest:" if others else "; `slimtune explain` lists them."
        screen.print(Text(f"no page is about this{nearest}", "bold"))
    else:
        screen.print(Text(f"{page.code}: {page.title}", "bold"))
        is_command = False
        for line in page.body.splitlines():
            if line.startswith("```"):
                is_command = not is_command
            elif line.startswith("## "):
                screen.print(Text(line[3:], "bold"))
                if line == "## Fix" and "slimtune train …" in page.body:
                    screen.print("… stands for your recipe, or for the flags of your command.")
            else:  # a command must stay in one line, so that it can be copied
                line = f"    {line}" if is_command else line.replace("<http", "http").removesuffix(">")
                screen.print(line, soft_wrap=is_command or None)
        if others:
            screen.print(Text("\nSee also", "bold"))
    if others:
        screen.print(
            make_table("", "", text_column_indices=(1,), rows=[(f"  {other.code}", other.title) for other in others])
        )
