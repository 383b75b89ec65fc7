"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def format_markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], left_aligned_columns: Collection[int] = ()
) -> str:
    """Return a table in Markdown; columns are aligned to the right, except the `left_aligned_columns`."""
    alignment = [" --- " if i in left_aligned_columns else " ---: " for i in range(len(heads))]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(alignment)}|", *lines[1:]])
