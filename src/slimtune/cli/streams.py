"""Output to a reader that may go away: a closed terminal, a broken pipe, a log on a full disk."""

from collections.abc import Container
from typing import Any, TextIO


class WriteErrorIgnoringStream:
    """A text stream whose failed writes are dropped, so that work of hours does not end with the terminal it began in.

    `errors` are the error numbers that are tolerated; None: all.
    """

    def __init__(self, stream: TextIO, ignored_errnos: Container[int | None] | None = None) -> None:
        self._stream, self._errors = stream, ignored_errnos

    def write(self, text: str) -> int:
        """Write text if anybody still reads it."""
        try:
            return self._stream.write(text)
        except OSError as e:
            self._raise_unless_tolerated(e)
            return len(text)

    def flush(self) -> None:
        """Flush what was written if anybody still reads it."""
        try:
            self._stream.flush()
        except OSError as e:
            self._raise_unless_tolerated(e)

    def writelines(self, lines: Any) -> None:
        """Write lines if anybody still reads them."""
        for line in lines:
            self.write(line)

    def _raise_unless_tolerated(self, error: OSError) -> None:
        if self._errors is not None and error.errno not in self._errors:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
