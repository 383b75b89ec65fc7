"""Documents, and their windows: parts of at most `max_seq_len` tokens, none of which crosses a document's border.

    document   [bos] t1 t2 t3 t4 t5 t6 t7 eos         bos: if the tokenizer adds one
    windows    [bos] t1 t2 t3
                     [bos] t3 t4 t5                   t3 is context: its loss is in the window before
                                 [bos] t5 t6 t7 eos

Every token but the first is learned once in each pass, and a window sees nothing of the others. A longer document has
as many windows in every epoch, so that epochs have the same steps, and in each epoch a first window of another length,
drawn by seed and epoch: then all cuts are elsewhere, and a run that is resumed has the cuts of the run that was killed.

    n predicted tokens, w = max_seq_len - 1 (- 1 with bos) in a window; k windows, which have room for k·w - n more
    first window: min(w, 2w - room - 1) tokens or fewer, by `room` at most; the last one has the rest
"""

from typing import Any, Self

import numpy as np

from ...core.data.chat_template import adds_bos
from ...core.data.rows import Fields, Record, RowFormat
from ...core.data.tokenized_dataset import IGNORE_INDEX, Example, TokenizedDataset
from ...errors import UsageError
from .texts import parse_text_record


class DocumentWindows(TokenizedDataset):
    """The windows of tokenized documents, read from their Arrow table as they are asked for.

    Args:
        documents: the tokenized documents.
        max_seq_len: most tokens of a window.
        bos: the token that begins each document, if the tokenizer adds one: so does each window.
        cut_seed: of the cuts, which `for_epoch` makes; None: the cuts are always the same, as few windows as possible.
    """

    def __init__(
        self, documents: TokenizedDataset, max_seq_len: int, bos: int | None = None, cut_seed: int | None = None
    ) -> None:
        super().__init__(documents.table, documents.indices)  # lines, hashes and the digest are the documents'
        self._documents, self.max_seq_len, self.bos, self.cut_seed = documents, max_seq_len, bos, cut_seed
        self._prefix = [] if bos is None else [bos]
        self._cut(None)

    def __len__(self) -> int:
        return len(self._owners)

    def for_epoch(self, epoch: int) -> Self:
        """Return the windows of an epoch, as many as of any other."""
        if self.cut_seed is None:
            return self
        windows = type(self)(self._documents, self.max_seq_len, self.bos, self.cut_seed)
        windows._cut(np.random.default_rng([self.cut_seed, epoch]))
        return windows

    def cut_into(self, count: int, min_tokens: int = 64) -> Self:
        """Return the same documents in windows that are shorter if needed: `count` of them, or of `min_tokens` each."""
        tokens = max(min_tokens, -(-int(self._documents.lengths.sum()) // count))
        return type(self)(self._documents, min(self.max_seq_len, tokens + 1 + len(self._prefix)), self.bos)

    @property
    def documents(self) -> TokenizedDataset:
        return self._documents

    @property
    def owners(self) -> np.ndarray:
        return self._owners

    @property
    def lengths(self) -> np.ndarray:
        inside = self._starts > 1  # such a window begins with its context
        return self._ends - self._starts + 1 + len(self._prefix) * inside

    def select(self, document_indices: np.ndarray) -> "DocumentWindows":
        """Return the windows of these documents."""
        return DocumentWindows(self._documents.select(document_indices), self.max_seq_len, self.bos, self.cut_seed)

    def read(self, row: int, start: int = 0, end: int | None = None) -> Example:
        """Return one window, or its tokens from `start` to `end`."""
        begin, stop = int(self._starts[row]), int(self._ends[row])
        example = self._documents.read(int(self._owners[row]), begin - 1, stop)
        if begin > 1:
            example["input_ids"] = [*self._prefix, *example["input_ids"]]
            example["labels"] = [IGNORE_INDEX] * (len(self._prefix) + 1) + example["labels"][1:]
        return example | {name: example[name][start:end] for name in ("input_ids", "labels")}

    def _cut(self, rng: np.random.Generator | None) -> None:
        """Find the predicted tokens of each window, [start, end) of its document.

        Without `rng`, first windows are as long as they can be, so that some window is as long as any of an epoch.
        """
        lengths = self._documents.lengths
        counts, low, high = count_windows_and_first_window_token_range(
            lengths, self.max_seq_len, len(self._prefix), vary=self.cut_seed is not None
        )
        first = high if rng is None else rng.integers(low, high, endpoint=True)
        w = _get_window_size(self.max_seq_len, len(self._prefix))
        self._owners = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(self._owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        end = 1 + first[self._owners] + number * w
        self._starts = np.where(number == 0, 1, end - w)
        self._ends = np.where(number == counts[self._owners] - 1, lengths[self._owners], end)


def _get_window_size(max_seq_len: int, prefix: int) -> int:
    """Return the most predicted tokens of a window inside a document; raise UsageError if there is none.

    `prefix` tokens and one token of context come before them.
    """
    if max_seq_len < prefix + 2:
        message = f"max_seq_len is {max_seq_len}, and a window begins with {prefix + 1} tokens that it does not learn"
        raise UsageError(message, f"at least {prefix + 2}, and better some hundred")
    return max_seq_len - 1 - prefix


def count_windows_and_first_window_token_range(
    document_lengths: np.ndarray, max_seq_len: int, prefix: int, *, vary: bool
) -> tuple[Any, Any, Any]:
    """Return the number of windows of each document, and the least and most predicted tokens of its first window.

    `document_lengths` are the documents' tokens. If the cuts must `vary`, a document whose fewest windows leave little
    room to move them has one window more.
    """
    w, predicted = _get_window_size(max_seq_len, prefix), np.maximum(document_lengths - 1, 0)
    counts = -(-predicted // w)
    counts += vary & (2 * (counts * w - predicted) + 1 < w)
    room = counts * w - predicted
    low, high = np.maximum(1, w - room), np.minimum(w, 2 * w - room - 1)
    whole = document_lengths <= max_seq_len
    return np.where(whole, 1, counts), np.where(whole, predicted, low), np.where(whole, predicted, high)


def make_document_windows(
    documents: TokenizedDataset, max_seq_len: int, tokenizer: Any, random_cut_seed: int | None = None
) -> DocumentWindows:
    """Return the windows of tokenized documents; arguments as for `DocumentWindows`."""
    return DocumentWindows(
        documents, max_seq_len, tokenizer.bos_token_id if adds_bos(tokenizer) else None, random_cut_seed
    )


def _read_document(record: Record) -> Fields:
    return {**parse_text_record(record), "special_tokens_as_text": True}


DOCUMENT = RowFormat(("text",), (), _read_document, by_name_only=True, window_cutter=make_document_windows)
