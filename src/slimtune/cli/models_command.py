"""`slimtune models`: the bases that plans know without a download."""

import textwrap
from typing import Annotated, Any

from typer import Option

from ..core.foundation.formatting import format_count
from .common import Json, make_console, make_table, print_fields, print_outdated_figures_notice


def models_table(
    family: Annotated[str | None, Option(help="Only a family, such as qwen, or bases whose name begins so.")] = None,
    sources: Annotated[
        bool,
        Option("--sources", help="Also show each base's ids, the source of its facts, and when they were checked."),
    ] = False,
    as_json: Json = False,
) -> Any:
    """List the bases with a short name: size, licence, context, release, and whether a download needs an account."""
    from ..planning.known_bases import KnownBasesResult, list_known_bases

    bases = list_known_bases(family)
    if not as_json:
        rows = (
            (
                b.name, format_count(b.params), str(b.context), b.released,
                "\n".join(textwrap.wrap(b.licence, 18, break_long_words=False)), "yes" if b.gated else "no",
            )
            for b in bases
        )  # fmt: skip
        found = make_table(
            "base", "size", "context", "released", "licence", "gated", text_column_indices=[4, 5], rows=rows
        )
        found.padding = (0, 1, 0, 0)  # room for 18 characters of a licence in 80 columns
        make_console().print(found)
        make_console().print("\ngated: the Hub wants an account that has accepted the licence")
        make_console().print("every command also takes a Hub id, a folder or a GGUF file")
        print_outdated_figures_notice(b.checked for b in bases)
        if sources:
            make_console().print()
            for b in bases:
                print_fields([(b.name, b.format_source())])
    return KnownBasesResult(bases)
