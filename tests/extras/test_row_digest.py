"""One hash of a dataset's rows, whatever blocks and chunks they are gathered from."""

import hashlib

import numpy as np
import pytest

from slimtune.core.data.tokenized_dataset import TemporaryTokenizedDatasetWriter
from slimtune.core.foundation.sequences import IGNORE_INDEX
from slimtune.extras import row_digest
from slimtune.extras.row_digest import hash_rows


def write_rows(batches, **columns):
    """Write batches of 30 rows of up to 12 tokens, some without any."""
    draws = np.random.default_rng(0)
    with TemporaryTokenizedDatasetWriter() as writer:
        for _ in range(batches):
            lengths = draws.integers(0, 12, 30)
            ids = draws.integers(0, 50_000, lengths.sum()).astype(np.int32)
            writer.write(ids, draws.random(len(ids)) < 0.5, lengths, np.arange(30), **columns)
        return writer.finish()


def hash_one_by_one(dataset):
    digest = hashlib.sha256()
    for example, classes in zip(dataset, dataset.classes, strict=True):
        ids, is_learned = np.array(example["input_ids"], np.int32), np.array(example["labels"]) != IGNORE_INDEX
        digest.update(np.int64(len(ids)).tobytes() + np.where(is_learned, ~ids, ids).astype(np.int32).tobytes())
        digest.update("\0".join(classes).encode() + str(example.get("row_scores") or "").encode())
    return digest.hexdigest()


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize(
    "columns", [{}, {"classes": [["ham", "é"], []] * 15}, {"row_scores": [None, [0.5, 1.0], []] * 10}]
)
def test_hash_is_that_of_the_rows_one_by_one(block, columns, monkeypatch):
    monkeypatch.setattr(row_digest, "BLOCK_ROWS", block)
    rows = write_rows(5, **columns)
    order = np.random.default_rng(1).permutation(len(rows))
    for dataset in (rows, rows.select(order), rows.select(order[:17]), rows.select(order[:0])):
        assert hash_rows(dataset) == hash_one_by_one(dataset)
    assert hash_rows(rows) != hash_rows(rows.select(order))
