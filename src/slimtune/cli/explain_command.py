"""`slimtune explain`: what a code, an error or a question is about, from the pages in `slimtune/knowledge`."""

import sys
from typing import Annotated, Any

from rich.text import Text
from typer import Argument

from ..diagnostics.knowledge import MOST_TEXT, ErrorPage, load_error_pages, search_error_pages
from ..diagnostics.knowledge.guides import find_command_guides
from ..errors import UsageError
from .common import Json, NegativeVerdictResult, make_console, make_table

Words = Annotated[
    list[str] | None,
    Argument(metavar="[CODE|TEXT]", help="A code, an error, a question, or - to read the standard input."),
]


def explain_error(text: Words = None, as_json: Json = False) -> dict[str, Any] | NegativeVerdictResult:
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
            make_console().print(make_table("", "", left=(1,), rows=[(page.code, page.title) for page in pages]))
        return {"pages": [_summarize(page) for page in pages]}
    found, nearest = search_error_pages(words)
    page, guides = nearest[0] if found else None, [] if found else find_command_guides(words)
    if not as_json:
        _print_answer(page, nearest[1:] if page else nearest, guides)
    result: dict[str, Any] = _summarize(page) | {"text": page.body} if page else {"code": None}
    result["nearest"] = [_summarize(other) for other in (nearest[1:] if page else nearest)]
    result["guides"] = [{"answer": answer, "what": what} for answer, what in guides]
    return result if page else NegativeVerdictResult(result)


def _summarize(page: ErrorPage) -> dict[str, str]:
    return {"code": page.code, "title": page.title}


def _print_answer(page: ErrorPage | None, others: list[ErrorPage], guides: list[tuple[str, str]]) -> None:
    screen = make_console()
    if guides:
        screen.print(Text("This is not an error. What answers it:", "bold"))
        for answer, what in guides:
            screen.print(Text(f"  {answer}{'' if answer.endswith('?') else ':'} {what}"))
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
        screen.print(make_table("", "", left=(1,), rows=[(f"  {other.code}", other.title) for other in others]))
