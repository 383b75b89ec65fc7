"""The flag `--column ROLE=COLUMN`."""

from collections.abc import Collection

from ..errors import UsageError


def parse_column_flags(pairs: Collection[str]) -> dict[str, str]:
    """Return the columns that `--column ROLE=COLUMN` names, by role; raise UsageError for another form."""
    columns = {}
    for pair in pairs:
        role, _, column = (part.strip() for part in pair.partition("="))
        if not role or not column:
            raise UsageError(f"--column got {pair!r}", "role=column", "for example --column messages=dialog")
        columns[role] = column
    return columns
