"""What files rows are read from: every kind gives the same rows, and every fault its place and one clear message."""

import csv
import gc
import json
import re
import tracemalloc

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from slimtune.data.dataset import InvalidRow, Row, open_rows, read_rows
from slimtune.errors import DataError, UsageError
from slimtune.utils.files import parse_dataset_id

TEXT = {"text": "Größe 🙂"}
ROWS = [{"instruction": f"Define {i}, please", "output": f"Größe\n{i} 嘘"} for i in range(5)]


def written(folder, kind, rows=ROWS, name="rows"):
    path = folder / f"{name}{kind}"
    if kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            out.writeheader()
            out.writerows(rows)
    return path


def answers(rows):
    return [row.messages[-1]["content"] for row in rows]


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows_any_number_of_times(tmp_path, kind):
    file = open_rows(written(tmp_path, kind))
    first, again = list(file), list(file)
    assert first == again
    assert (file.format, answers(first)) == ("instruction", [row["output"] for row in ROWS])
    # In a table of text a row of two lines begins on the line after them.
    assert [row.line for row in first] == ([2, 4, 6, 8, 10] if kind in (".csv", ".tsv") else [1, 2, 3, 4, 5])


def test_a_text_file_is_parted_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\ntwo\r\n\r\n \n\nThree\n\n".encode())
    assert read_rows(tmp_path / "a.txt") == [Row([], 1, completion="One\r\ntwo"), Row([], 6, completion="Three")]


def test_a_folder_is_its_files_in_order(tmp_path):
    written(tmp_path, ".jsonl", ROWS[:2], "b")
    written(tmp_path, ".jsonl", ROWS[2:], "a")
    (tmp_path / "README.md").write_text("about them")
    rows = read_rows(tmp_path)
    assert [(row.file, row.line) for row in rows] == [("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 3), ("b.jsonl", 1),
                                                     ("b.jsonl", 2)]  # fmt: skip
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"b\.jsonl:3: does not parse as JSON"):
        read_rows(tmp_path)


def test_a_folder_of_several_formats_kinds_or_splits_is_refused(tmp_path):
    written(tmp_path, ".jsonl", ROWS, "a")
    written(tmp_path, ".jsonl", [{"text": "x"}], "b")
    with pytest.raises(DataError, match=r"several formats: a\.jsonl is instruction, b\.jsonl is text"):
        open_rows(tmp_path)
    written(tmp_path, ".csv", ROWS, "c")
    with pytest.raises(UsageError, match=r"several kinds of files: 'a\.jsonl', 'b\.jsonl', 'c\.csv'"):
        open_rows(tmp_path)
    (tmp_path / "s").mkdir()
    written(tmp_path / "s", ".jsonl", ROWS, "train-00001")
    written(tmp_path / "s", ".jsonl", ROWS, "test")
    with pytest.raises(UsageError, match=r"several splits: 'test\.jsonl', 'train-00001\.jsonl'"):
        open_rows(tmp_path / "s")
    (tmp_path / "e").mkdir()
    with pytest.raises(UsageError, match="without a file of rows; it contains nothing"):
        open_rows(tmp_path / "e")


def test_what_datasets_saved(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "tool_calls": None}]
    Dataset.from_list([{"messages": talk}, {"messages": talk[1:]}]).save_to_disk(tmp_path / "one")
    file = open_rows(tmp_path / "one")
    assert file.format == "chat"
    assert [(row.line, len(row.messages)) for row in file] == [(1, 2), (2, 1)]
    assert "tool_calls" not in next(iter(file)).messages[1]
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match="contains the splits 'test', 'train'"):
        open_rows(tmp_path / "two")
    assert answers(read_rows(tmp_path / "two" / "train")) == [row["output"] for row in ROWS]


def test_a_dataset_by_its_id(tmp_path, monkeypatch):
    """The Hub's own loader, on a repository that lies here: its files, its splits."""
    (tmp_path / "org" / "name" / "data").mkdir(parents=True)
    written(tmp_path / "org" / "name" / "data", ".jsonl", ROWS, "train")
    written(tmp_path / "org" / "name" / "data", ".jsonl", ROWS[:1], "test")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    real, asked = datasets.load_dataset, []

    def load(name, config, split):
        asked.append((name, config, split))
        return real(str(tmp_path / name), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert answers(read_rows("org/name")) == [row["output"] for row in ROWS]
    assert len(read_rows("org/name:test")) == 1
    assert set(asked) == {("org/name", None, "train"), ("org/name", None, "test")}
    with pytest.raises(
        UsageError, match=r"there is no file 'org/name', and it cannot be loaded from the Hub: .*tset"
    ) as fault:
        read_rows("org/name:tset")
    assert "org/name/config:split" in fault.value.expected


def test_which_paths_may_name_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert parse_dataset_id("org/name") == ("org/name", None, "train")
    assert parse_dataset_id("org/name/main:test[:10%]") == ("org/name", "main", "test[:10%]")
    for path in ("rows.jsonl", "org/rows.jsonl", "data/rows", "name", "/org/name", "./org/name", "a/b/c/d"):
        assert parse_dataset_id(path) is None, path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_an_empty_file(tmp_path, kind):
    (tmp_path / f"a{kind}").write_text("" if kind != ".json" else "[ ]")
    with pytest.raises(DataError, match="is empty: it has no row"):
        open_rows(tmp_path / f"a{kind}")


def test_tables_without_a_row(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\n")
    with pytest.raises(DataError, match="is empty"):
        open_rows(tmp_path / "a.csv")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="is empty"):
        open_rows(tmp_path / "a.parquet")


def faults(path):
    return [(found.line, found.code) for found in open_rows(path) if isinstance(found, InvalidRow)]


def write_lines(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_byte_order_mark_blank_lines_and_crlf(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "\ufeff" + json.dumps(TEXT), "", {**TEXT, "id": 7}, "  ")
    assert [row.line for row in read_rows(path)] == [1, 3]
    (tmp_path / "crlf.jsonl").write_bytes(f"{json.dumps(TEXT)}\r\n".encode())
    assert read_rows(str(tmp_path / "crlf.jsonl")) == [Row([], 1, completion="Größe 🙂")]


def test_a_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "train.jsonl", TEXT)
    with pytest.raises(UsageError, match=r"no such file: .*trian\.jsonl; did you mean 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UsageError, match="there is no folder"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


def test_a_line_that_does_not_parse_is_shown_shortened(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXT, '{"messages": [oops' + "x" * 200)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert error.value.exit_code == 1
    assert f"{path}:2: does not parse as JSON (Expecting value at column 15)" in error.value.message
    assert '{"messages": [oopsxxx' in error.value.message
    assert error.value.message.endswith("… (218 characters)")


def test_up_to_ten_errors_are_reported_together(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "{", TEXT, {"text": ""}, "[1]")
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert re.findall(r"a\.jsonl:(\d)", error.value.message) == ["1", "3", "4"]
    with pytest.raises(DataError, match="the first 10 errors") as error:
        read_rows(write_lines(tmp_path / "b.jsonl", *["{"] * 15), format="text")
    assert error.value.message.count("does not parse") == 10


def test_malformed_lines_are_named_and_the_rest_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n\n{"text": "\xff"}\n[1]\n{"text": "b"}\n')
    assert faults(tmp_path / "a.jsonl") == [(2, "bad-json"), (4, "not-utf8"), (5, "not-an-object")]
    assert [row.line for row in open_rows(tmp_path / "a.jsonl") if isinstance(row, Row)] == [1, 6]


def test_a_broken_array_ends_where_it_breaks(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, 3, {"text": "b"}, {"text": oops}, {"text": "c"}]')
    assert faults(tmp_path / "a.json") == [(2, "not-an-object"), (4, "bad-json")]
    (tmp_path / "b.json").write_text('[{"text": "a"}')
    assert faults(tmp_path / "b.json") == [(2, "bad-json")]
    (tmp_path / "c.json").write_text('[{"text": "a"}] {"text": "b"}')
    assert faults(tmp_path / "c.json") == [(2, "bad-json")]
    (tmp_path / "d.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(read_rows(tmp_path / "d.json")) == 2


def test_an_item_longer_than_what_is_read_at_once(tmp_path):
    rows = [{"text": "a" * 3_000_000}, {"text": "b"}, {"text": "c" * 1_500_000}]
    assert [len(row.completion) for row in read_rows(written(tmp_path, ".json", rows))] == [3_000_000, 1, 1_500_000]


def test_tables_that_are_none(tmp_path):
    (tmp_path / "a.csv").write_text("instruction;output\na;b\n")
    with pytest.raises(DataError, match=r"one column, 'instruction;output': the delimiter seems to be ';'"):
        open_rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("instruction,output,output\na,b,c\n")
    with pytest.raises(DataError, match="names 'output' twice"):
        open_rows(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text('instruction,output\na,b\nc\nd,"e\nf"\n\ng,h,i\n')
    assert faults(tmp_path / "c.csv") == [(3, "bad-csv"), (7, "bad-csv")]
    (tmp_path / "d.csv").write_bytes(b'instruction,output\na,\xff\n"a,b\n')
    assert faults(tmp_path / "d.csv") == [(2, "not-utf8"), (3, "bad-csv")]
    (tmp_path / "a.parquet").write_text("instruction,output\n")
    with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file, or is incomplete"):
        open_rows(tmp_path / "a.parquet")
    whole = written(tmp_path, ".parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a Parquet file, or is incomplete"):
        open_rows(tmp_path / "b.parquet")


def test_an_unknown_kind_names_the_known(tmp_path):
    (tmp_path / "a.jsnl").write_text("{}")
    with pytest.raises(UsageError, match=r"unknown suffix '\.jsnl'; did you mean '\.jsonl'\?"):
        open_rows(tmp_path / "a.jsnl")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_large_file_streams(tmp_path, kind):
    """Eight times the rows take no more memory."""
    peaks = []
    for n in (500, 4_000):
        path = written(tmp_path, kind, [{"instruction": f"{i} " * 600, "output": "x" * 40} for i in range(n)])
        file = open_rows(path)
        gc.collect()
        tracemalloc.start()
        assert sum(1 for _ in file) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000
    assert path.stat().st_size > 10_000_000
