"""How a run gets a report on its rows: the core tokenizes them, and a part that is not in the core watches and judges.

observer = DATA_REPORTS.load("rows")(tokenizer, rows, max_seq_len=1024)
dataset, stats = tokenize_dataset(rows, tokenizer, max_seq_len=1024, path=…, observer=observer)
    observer.measure_batch   where a batch is tokenized, possibly in another process
    observer.on_batch        gets the tokenized batches with what was measured, in the order of the file
report = observer.finish(file=…, model=…)
report.require_no_errors()
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from ..foundation.registry import Registry

if TYPE_CHECKING:
    from .tokenize import PairedRow, TokenizedBatch


class RowFindingsSummary(Protocol):
    """What was found in the rows of a file: a frozen dataclass, which the run folder keeps as JSON."""

    @property
    def file(self) -> str: ...

    @property
    def verdict(self) -> str:
        """ "ok", "warnings" or "errors"; "not checked" if no tokenizer read the rows."""

    @property
    def saved_share(self) -> float:
        """Share of the tokens that are not computed because rows of a step share a prefix."""

    def format_verdict(self) -> str:
        """Return the verdict with the numbers of findings, as one line."""

    def summarize(self) -> list[str]:
        """Return the verdict, columns, notes and findings, for the log of a run."""

    def require_no_errors(self) -> None:
        """Raise DataError with every finding that is an error."""


class TokenizedBatchObserver(Protocol):
    """Watches the rows of a file while they are tokenized."""

    @property
    def measure_batch(self) -> "Callable[[Sequence[PairedRow]], Any] | None":
        """The function that measures a batch from its rows and their tokens; it is sent to other processes."""

    def on_batch(self, batch: "TokenizedBatch") -> None:
        """Take the next batch of the file; `batch.stats` is what `measure_batch` returned."""

    def kept_hashes(self) -> np.ndarray:
        """Return a hash of the text of each row that is kept, uint64 [N]; it depends on neither base nor seed."""

    def finish(
        self, *, file: str | Path, model: str | None, validation: tuple[str, Self] | None = None
    ) -> RowFindingsSummary:
        """Return the report, once; `validation` is the file of the validation rows and their observer."""


DATA_REPORTS: Registry[Callable[..., TokenizedBatchObserver]] = Registry("slimtune.data_reports", "data report")
"""Functions that start a report.

Their arguments: tokenizer, rows (a `RowFileReader`), max_seq_len, on_overlong, rows_per_step, and `compared_with`, the
observer of rows that these will be compared with.
"""
