"""The formats of a row: how a record becomes a `Row` (core/data/rows.py).

A new format is a `RowFormat` in a file here and a line in `slimtune/parts.py`. Columns that no format names are not
used; the data report names them, and one of `row_columns.COLUMN_MEANINGS` is an error. Imports the core alone. Start at
`chats.py`.
"""
