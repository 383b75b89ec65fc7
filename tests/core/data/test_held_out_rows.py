"""Rows that a run sets aside from its training file, for validation and for `slimtune eval`."""

import numpy as np
import pytest
import torch
from tiny_run import write_rows

from slimtune.core.config import load_recipe
from slimtune.core.training.datasets import tokenize_recipe_datasets


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """Return `load(**settings)`: the data sets of a recipe over 40 rows, of which the last two repeat the first two."""
    path = write_rows(tmp_path / "rows.jsonl", 38)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, *lines[:2]]))

    def run(**settings):
        base = {"model": "unused", "data.train": str(path), "output_dir": "unused"}
        return tokenize_recipe_datasets(load_recipe(None, {**base, **settings}), tiny_tokenizer())

    return run


def lines(rows):
    return {e["line"] for e in rows}


def test_no_row_is_in_two_parts(load):
    data = load(**{"data.test_fraction": 0.2, "data.validation_fraction": 0.1})
    parts = [lines(data.train), lines(data.validation), lines(data.test)]
    assert set.union(*parts) == set(range(1, 41))
    assert sum(map(len, parts)) == 40
    assert (len(data.validation), len(data.test)) in ((4, 8), (4, 9))


def test_rows_with_the_same_text_stay_together(load):
    for fraction in (0.1, 0.3, 0.5):
        held_out = lines(load(**{"data.test_fraction": fraction}).test)
        assert (1 in held_out) == (39 in held_out)
        assert (2 in held_out) == (40 in held_out)


def test_neither_seed_nor_validation_changes_the_test_rows(load):
    settings = {"data.test_fraction": 0.2, "train.seed": 1}
    held_out = lines(load(**settings).test)
    assert held_out == lines(load(**{**settings, "train.seed": 2}).test)
    assert held_out == lines(load(**{**settings, "data.validation_fraction": 0}).test)


def test_validation_rows_are_those_of_before_without_test_rows(load):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(42))
    assert lines(load(**{"data.validation_fraction": 0.1}).validation) == {i + 1 for i in order[:4].tolist()}
    assert not len(load().test)


def test_dropped_rows_do_not_shift_the_split(load):
    whole = load(**{"data.test_fraction": 0.3})
    middle = int(np.median(whole.lengths()))
    shorter = load(**{"data.test_fraction": 0.3, "data.max_seq_len": middle})
    assert 0 < shorter.train_stats.kept < 40
    assert len(lines(shorter.test) - lines(whole.test)) <= 2
