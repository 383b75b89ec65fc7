"""What a path holds: a file, a folder or a dataset, each read any number of times.

.jsonl .ndjson   one JSON value a line                 .csv .tsv   a header, then one record a row
.json            an array of objects, or as .jsonl     .parquet    one record a row
.txt             records of text between blank lines   a folder    such files of one kind, by name
a folder that `datasets` saved, or a dataset's id      org/name[/config][:split], split train where none is named
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UsageError, format_names, nearest
from ..utils.dataset_id import parse_dataset_id
from .records import READERS, Found, read_arrow, shorten

Reader = Callable[[], Iterator[Found]]
SPLITS = {"train": "train", "training": "train", "valid": "validation", "validation": "validation", "val": "validation",
          "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip


def parts(path: Path) -> list[tuple[str | None, Reader]]:
    """Return what a path holds: for each file its name (None: it is the only one) and what reads it.

    Raises:
        UsageError: there is no such file or dataset, it is of no known kind, or a folder is not of one kind.
    """
    if path.is_file():
        return [(None, _reader(path))]
    if path.is_dir():
        return _folder(path)
    if (named := parse_dataset_id(path)) is not None:
        return [(None, _hub(*named))]
    folder = path.parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    where = "" if folder.is_dir() else f" (there is no folder {folder} either)"
    got = f"no such file: {path}{where}{nearest(path.name, names)}"
    raise UsageError(got, f"a file of rows ({', '.join(READERS)}), or a folder", "check the path given for the data")


def _reader(path: Path) -> Reader:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UsageError(
            f"{path} is of an unknown kind {suffix!r}{nearest(suffix, READERS)}",
            f"a file of rows: {', '.join(READERS)}",
            "rename it, or write it as one of these",
        )

    def read() -> Iterator[Found]:
        try:
            yield from READERS[suffix](path)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
            ) from error

    return read


def _folder(path: Path) -> list[tuple[str | None, Reader]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UsageError(
            f"{path} holds the splits {format_names(splits)}",
            "one of them",
            f"name it: {path / (splits or ['train'])[0]}",
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [(None, _saved(path))]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and not p.name.startswith("."))
    kinds = sorted({f.suffix.lower() for f in files})
    if not files:
        held = format_names(sorted(p.name for p in path.iterdir())) or "nothing"
        raise UsageError(f"{path} is a folder without a file of rows: it holds {held}", f"one of {', '.join(READERS)}")
    if len(kinds) > 1:
        raise UsageError(
            f"{path} is a folder of several kinds of files: {format_names(f.name for f in files)}",
            "files of one kind",
            "name one of its files, or move the others away",
        )
    split = {SPLITS[word] for f in files if (word := re.split(r"[-_.\d]", f.stem.lower())[0]) in SPLITS}
    if len(split) > 1:
        raise UsageError(
            f"{path} is a folder of several splits: {format_names(f.name for f in files)}",
            "rows to train on apart from rows to measure on",
            f"name one of its files: {files[-1]}",
        )
    return [(f.name, _reader(f)) for f in files]


def _saved(path: Path) -> Reader:
    def read() -> Iterator[Found]:
        from datasets import load_from_disk

        yield from read_arrow(load_from_disk(str(path)))

    return read


def _hub(name: str, config: str | None, split: str) -> Reader:
    def read() -> Iterator[Found]:
        from datasets import load_dataset

        try:
            data = load_dataset(name, config, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"no file {name!r} is here, and as a dataset of the Hub it cannot be had: {shorten(str(error), 300)}",
                "a file, a folder, or a dataset as org/name, org/name:split or org/name/config:split",
                "check the name and the connection",
            ) from error
        yield from read_arrow(data)

    return read
