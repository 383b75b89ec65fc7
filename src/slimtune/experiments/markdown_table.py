"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def format_markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = ()) -> str:
    """Return a table in Markdown; columns are aligned to the right, except those whose numbers are `left`."""
    alignment = [" --- " if i in left else " ---: " for i in range(len(heads))]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(alignment)}|", *lines[1:]])
