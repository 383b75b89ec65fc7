"""Files that rows are read from: every kind gives the same rows, and every error names its place."""

import csv
import gc
import io
import json
import os
import re
import tracemalloc

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from row_files import write_jsonl

from slimtune.core.data.rows import InvalidRow, Row
from slimtune.core.foundation.files import parse_hub_dataset_id_or_none
from slimtune.errors import DataError, UsageError
from slimtune.extras import row_readers as readers
from slimtune.extras.row_files import open_rows, read_rows

ROWS = [{"instruction": f"Define {i}, please", "output": f"Größe\n{i} 嘘"} for i in range(5)]
OUTPUTS = [row["output"] for row in ROWS]


def write(folder, kind, rows=ROWS, name="rows"):
    path = folder / f"{name}{kind}"
    if kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind in (".jsonl", ".ndjson"):
        write_jsonl(path, rows)
    elif kind == ".parquet":
        path.write_bytes(parquet_bytes(rows))
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            out.writeheader()
            out.writerows(rows)
    return path


def parquet_bytes(rows):
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def write_bytes(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outputs(rows):
    return [row.messages[-1]["content"] for row in rows]


def errors_in(path):
    return [(found.line, found.code) for found in open_rows(path) if isinstance(found, InvalidRow)]


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    file = open_rows(write(tmp_path, kind))
    first, again = list(file), list(file)
    assert first == again
    assert (file.format, outputs(first)) == ("instruction", OUTPUTS)
    # In a table of text, a row of two lines begins on the line after them.
    assert [row.line for row in first] == ([2, 4, 6, 8, 10] if kind in (".csv", ".tsv") else [1, 2, 3, 4, 5])


def test_paragraphs(tmp_path):
    path = write_bytes(tmp_path / "a.txt", "\ufeffOne\r\ntwo\r\n\r\n \n\nThree\n\n")
    assert read_rows(path) == [Row([], 1, completion="One\r\ntwo"), Row([], 6, completion="Three")]
    write_bytes(path, b"One\n\nTw\xff\nThree\n\nFour")
    assert errors_in(path) == [(3, "not-utf8")]


def test_csv_with_semicolons_as_excel_writes_it(tmp_path):
    path = write_bytes(tmp_path / "a.csv", '\ufeffinstruction;output\r\nhi;"a, b; c"\r\n')
    assert outputs(read_rows(path)) == ["a, b; c"]
    with pytest.raises(DataError, match=r"UTF-8(.|\n)*iconv -f CP1252 -t UTF-8 a\.csv > utf8\.csv"):
        read_rows(write_bytes(path, "instruction;output\nhi;Größe\n".encode("cp1252")))


def test_folder(tmp_path):
    write(tmp_path, ".jsonl", ROWS[:2], "b")
    write(tmp_path, ".jsonl", ROWS[2:], "a")
    (tmp_path / "README.md").write_text("about them")
    found = [(row.file, row.line) for row in read_rows(tmp_path)]
    assert found == [("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 3), ("b.jsonl", 1), ("b.jsonl", 2)]
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"b\.jsonl:3: .*JSON"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a.jsonl": ROWS, "b.jsonl": [{"text": "x"}]}, DataError, r"a\.jsonl is instruction, b\.jsonl"),
        ({"a.jsonl": ROWS, "c.csv": ROWS}, UsageError, r"several kinds of files: 'a\.jsonl', 'c\.csv'"),
        ({"train-01.jsonl": ROWS, "test.jsonl": ROWS}, UsageError, r"splits: 'test\.jsonl', 'train-01\.jsonl'"),
        ({}, UsageError, "without a file of rows; it contains nothing"),
    ],
)  # fmt: skip
def test_mixed_or_empty_folder(tmp_path, files, error, message):
    for file, rows in files.items():
        write(tmp_path, "." + file.split(".")[1], rows, file.split(".")[0])
    with pytest.raises(error, match=message):
        open_rows(tmp_path)


def test_saved_dataset(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "tool_calls": None}]
    datasets.Dataset.from_list([{"messages": talk}, {"messages": talk[1:]}]).save_to_disk(tmp_path / "one")
    first, second = open_rows(tmp_path / "one")
    assert (first.line, second.line, second.messages) == (1, 2, [{"role": "assistant", "content": "A"}])
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(UsageError, match="'test', 'train'"):
        open_rows(tmp_path / "two")
    assert outputs(read_rows(tmp_path / "two" / "train")) == OUTPUTS


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_damaged_saved_dataset(tmp_path, name):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text('{"a": ')
    with pytest.raises(DataError, match="saved"):
        list(open_rows(tmp_path / "saved"))


def test_hub_dataset(tmp_path, monkeypatch):
    """The Hub's own loader reads a repository on this disk."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name", ".jsonl", ROWS, "train")
    write(tmp_path / "org" / "name", ".jsonl", ROWS[:1], "test")
    load = datasets.load_dataset

    def load_local(name, config, split):
        return load(str(tmp_path / name), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    assert outputs(read_rows("org/name")) == OUTPUTS
    assert len(read_rows("org/name:test")) == 1
    with pytest.raises(UsageError, match="'org/name'") as error:
        read_rows("org/name:tset")
    assert "org/name/config:split" in error.value.expected


def test_dataset_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert parse_hub_dataset_id_or_none("org/name") == ("org/name", None, "train")
    assert parse_hub_dataset_id_or_none("org/name/main:test[:10%]") == ("org/name", "main", "test[:10%]")
    for path in ("rows.jsonl", "org/rows.jsonl", "data/rows", "name", "/org/name", "./org/name", "a/b/c/d"):
        assert parse_hub_dataset_id_or_none(path) is None, path


def test_byte_order_mark_blank_lines_and_crlf(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", '\ufeff{"text": "Größe"}\r\n\n{"text": "b", "id": 7}\n  ')
    assert read_rows(str(path)) == [Row([], 1, completion="Größe"), Row([], 3, completion="b")]


EMPTY = "is empty: it has no row"
NO_PARQUET = "is not a Parquet file, or is incomplete"
UNUSABLE = [
    ("a.jsonl", "", DataError, EMPTY),
    ("a.json", "[ ]", DataError, EMPTY),
    ("a.csv", "", DataError, EMPTY),
    ("a.csv", "instruction,output\n", DataError, EMPTY),
    ("a.txt", "", DataError, EMPTY),
    ("a.parquet", parquet_bytes([]), DataError, EMPTY),
    ("a.parquet", parquet_bytes(ROWS)[:500], DataError, NO_PARQUET),
    ("a.parquet", "instruction,output\n", DataError, NO_PARQUET),
    ("a.csv", ",".join(f"c{i}" for i in range(20_000)) + "\na", DataError, "names 20,000 columns: 'c0', 'c1', 'c2'"),
    ("a.csv", "text\nGröße\n".encode("utf-16"), DataError, r"a\.csv is UTF-16 text"),
    ("a.txt", "Größe\n".encode("utf-32-be"), DataError, r"a\.txt is UTF-32 text"),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), DataError, "iconv -f UTF-16 -t UTF-8 a.jsonl > utf8.jsonl"),
    ("a.jsonl.gz", "", UsageError, r"unknown suffix '\.gz'(.|\n)*gunzip -k a\.jsonl\.gz"),
    ("a.rst", "# A", UsageError, r"unknown suffix '\.rst'(.|\n)*copy it to a\.txt"),
    ("a" * 300 + ".jsonl", None, UsageError, "no such file"),
    ("a\udcff\0.jsonl", None, UsageError, "no such file"),
    ("org/" + "a" * 300, None, UsageError, "no such file"),
    ("a.csv", "instruction\toutput\na\tb\n", DataError, r"delimiter seems to be '\\t'(.|\n)*rename it to a\.tsv"),
    ("a.tsv", "instruction;output\na;b\n", DataError, r"delimiter seems to be ';'(.|\n)*rename it to a\.csv"),
    ("a.csv", "instruction,output,output\na,b,c\n", DataError, "names 'output' twice"),
    ("a.jsnl", "{}", UsageError, r"unknown suffix '\.jsnl'; did you mean '\.jsonl'\?"),
    ("trian.jsonl", None, UsageError, r"no such file: .*trian\.jsonl; did you mean 'train\.jsonl'"),
    ("nowhere/train.jsonl", None, UsageError, "there is no folder"),
]


@pytest.mark.parametrize(("name", "content", "error", "message"), UNUSABLE)
def test_unusable_file(tmp_path, name, content, error, message):
    write(tmp_path, ".jsonl", name="train")
    if content is not None:
        write_bytes(tmp_path / name, content)
    with pytest.raises(error, match=message):
        open_rows(tmp_path / name)


def test_up_to_ten_errors_are_reported_together(tmp_path):
    long_line = '{"text": [oops' + "x" * 200
    path = write_bytes(tmp_path / "a.jsonl", f'{{\n{{"text": "a"}}\n{{"text": ""}}\n{long_line}\n')
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert error.value.exit_code == 1
    assert re.findall(r"a\.jsonl:(\d)", error.value.message) == ["1", "3", "4"]
    assert 'column 11): {"text": [oops' in error.value.message
    assert error.value.message.endswith("… (214 characters)")
    with pytest.raises(DataError, match=r"c\.jsonl.*column 10"):
        read_rows(write_bytes(tmp_path / "c.jsonl", '{"text": "cut'), format="text")
    with pytest.raises(DataError, match=r"first 10\b") as error:
        read_rows(write_bytes(tmp_path / "b.jsonl", "{\n" * 15), format="text")
    assert error.value.message.count("JSON") == 10


@pytest.mark.parametrize(
    ("name", "content", "errors"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n\n{"text": "\xff"}\n[1]\n{"text": "b"}\n',
         [(2, "bad-json"), (4, "not-utf8"), (5, "not-an-object")]),
        ("twice.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n{"text": "a", "x": {"y": 1, "y": 1}}',
         [(2, "duplicate-key"), (3, "duplicate-key")]),
        ("twice.json", '[{"text": "a", "text": "b"}, {"text": "c"}]', [(1, "duplicate-key")]),
        ("rest.jsonl", '{"text": "a"}\n{"text": "b"}x\n{"text": "c"}x', [(2, "bad-json"), (3, "bad-json")]),
        ("digits.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}\n", [(2, "bad-json")]),
        ("deep.jsonl", '{"text": "a"}\n' + "[" * 200_000 + "\n", [(2, "bad-json")]),
        ("array.json", '[{"text": "a"}, 3, {"text": "b"}, {"text": oops}, {"text": "c"}]',
         [(2, "not-an-object"), (4, "bad-json")]),
        ("cut.json", '[{"text": "a"}', [(2, "bad-json")]),
        ("after.json", '[{"text": "a"}] {"text": "b"}', [(2, "bad-json")]),
        ("lines.json", '{"text": "a"}\n{"text": "b"}\n', []),
        ("cells.csv", 'instruction,output\na,b\nc\nd,"e\nf"\n\ng,h,i\n', [(3, "bad-csv"), (7, "bad-csv")]),
        ("quote.csv", b'instruction,output\na,\xff\n"a,b\n', [(2, "not-utf8"), (3, "bad-csv")]),
    ],
)  # fmt: skip
def test_malformed_rows_are_named_and_the_rest_is_read(tmp_path, name, content, errors):
    path = write_bytes(tmp_path / name, content)
    assert errors_in(path) == errors
    assert any(isinstance(row, Row) for row in open_rows(path)) == (name != "quote.csv")


def test_item_longer_than_a_chunk(tmp_path):
    rows = [{"text": "a" * 3_000_000}, {"text": "b"}, {"text": "c" * 1_500_000}]
    assert [len(row.completion) for row in read_rows(write(tmp_path, ".json", rows))] == [3_000_000, 1, 1_500_000]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.slow
def test_files_stream(tmp_path, kind):
    """Eight times the rows take no more memory."""
    peaks = []
    for n in (500, 4_000):
        file = open_rows(write(tmp_path, kind, [{"instruction": f"{i} " * 600, "output": "x" * 40} for i in range(n)]))
        gc.collect()
        tracemalloc.start()
        assert sum(1 for _ in file) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000
    assert file.path.stat().st_size > 10_000_000


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_row_that_is_too_long(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 3_000)
    monkeypatch.setattr(readers, "JSON_CHUNK", 100)
    rows = [{"text": "a"}, {"text": "b" * 50_000}, {"text": "c"}]
    texts = "\n\n".join(row["text"] for row in rows)
    path = write(tmp_path, kind, rows) if kind != ".txt" else write_bytes(tmp_path / "a.txt", texts)
    first, wrong, *rest = open_rows(path, format="text")
    assert (first.completion, wrong.code) == ("a", "bad-csv" if kind == ".csv" else "too-large" if rest else "bad-json")
    assert [row.completion for row in rest] == ([] if kind in (".csv", ".json") else ["c"])


def test_parquet_row_group_of_rows_that_are_too_long_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 3_000)
    table = pyarrow.table({"text": [*("a" * 9_000 + str(i) for i in range(40)), "b"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    *wrong, last = open_rows(tmp_path / "a.parquet")
    assert {row.code for row in wrong} == {"too-large"}
    assert ([row.line for row in wrong], last.completion) == (list(range(1, 41)), "b")


def test_text_of_many_lines_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW", 3_000)
    path = write_bytes(tmp_path / "a.txt", "ab\n" * 2_000 + "\n\nc")
    assert [getattr(row, "code", row.line) for row in open_rows(path)] == ["too-large", 2003]


def test_pipes_and_proc_are_not_waited_for(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/kmsg")
    with pytest.raises(DataError, match="empty"):
        open_rows(tmp_path)
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(UsageError, match=r"'b\.jsonl'"):
        open_rows(tmp_path)
    with pytest.raises(UsageError, match=r"b\.jsonl .*pipe"):
        open_rows(tmp_path / "b.jsonl")


def test_parquet_times_that_python_has_no_value_for(tmp_path):
    times = pyarrow.array([2**60, 1], pyarrow.int64())
    text = pyarrow.array(["a", "b"])
    table = pyarrow.table(
        {"text": text, "when": times.cast(pyarrow.timestamp("us")), "long": times.cast("duration[s]")}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.completion for row in open_rows(tmp_path / "a.parquet")] == ["a", "b"]
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"\xff", b"b"]).buffers())
    parquet.write_table(pyarrow.table({"text": text, "name": wrong}), tmp_path / "b.parquet")
    assert errors_in(tmp_path / "b.parquet") == [(1, "not-utf8")]


@pytest.mark.parametrize("column", ["tools", "messages"])
def test_deep_nesting(tmp_path, column):
    deep = json.loads('{"a": [' * 240 + "1" + "]}" * 240)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    row = {"messages": messages, "tools": [{"name": "f", "parameters": deep}]}
    if column == "messages":
        messages[1]["tool_calls"], row["tools"] = [{"function": {"name": "f", "arguments": deep}}], None
    assert errors_in(write(tmp_path, ".jsonl", [row])) == [(1, "too-deep")]
