"""The working folder of the page: nothing that a browser names leaves it, not even through a link."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..core.foundation.files import (
    parse_hub_dataset_id_or_none,
    read_json_object,
    to_json,
    translate_os_errors,
    write_atomic,
    write_json,
)
from ..core.training.run_dir import RunDir
from ..errors import RunError, UsageError, suggest
from ..extras.known_models import load_known_models_by_alias

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
MAX_LISTED = 500
"""Most files, and most runs, that are looked for and shown."""
MAX_DEPTH = 3
"""Folders below the working folder in which files and runs are looked for."""
EXPORT_MANIFEST = "export_manifest.json"
RATINGS = "ratings"
"""The folder of answers that were rated in the chat, a file for each run."""
STATE_FILE = ".slimtune-ui.json"
SKIPPED = {"node_modules", "site-packages", "checkpoints", "adapter"}


class WorkspaceFolder:
    """A folder with rows and runs."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def resolve(self, text: str) -> Path:
        """Return an existing file or folder in the working folder.

        Raises:
            UsageError: it does not exist, or it is, or links to, something outside.
        """
        if not text.strip():
            raise UsageError("no path is given", "a file or folder in the working folder")
        path = self.root / Path(text).expanduser()
        try:
            real = path.resolve(strict=True)
        except FileNotFoundError:
            self._require_inside(path.resolve(), text)
            close = suggest(text, [*self.list_rows(), *self.list_runs()])
            raise UsageError(f"there is no {text!r} in the working folder{close}") from None
        except (OSError, RuntimeError, ValueError) as e:  # too long, a circle of links, NUL
            raise UsageError(f"{text[:200]!r} is not a path: {e}", "a path in the working folder") from None
        self._require_inside(real, text)
        for folder, folders, names in os.walk(real):
            for link in (Path(folder, name) for name in (*folders, *names) if os.path.islink(Path(folder, name))):
                self._require_inside(link.resolve(), str(link.relative_to(self.root)))
        return real

    def resolve_new(self, text: str) -> Path:
        """Return the path of something to be written, in the working folder; it need not exist."""
        if not re.fullmatch(r"[\w][\w. -]*(/[\w][\w. -]*)*", text.strip()) or len(text) > 200:
            raise UsageError(f"{text[:80]!r} is no name for a folder", "letters, digits, - _ . and / between folders")
        path = self.root / text.strip()
        self._require_inside(path.resolve(), text)
        return path

    def suggest_new(self, name: str) -> str:
        """Return a name that nothing in the working folder has: this one, or with a number behind it."""
        stem = re.sub(r"-\d+$", "", name)
        names = itertools.chain([name], (f"{stem}-{number}" for number in range(2, 1000)))
        return next((n for n in names if "\0" not in n and not os.path.lexists(self.root / n)), name)

    def resolve_rows(self, text: str) -> str:
        """Return the rows that a browser names, relative to the working folder, or the id of a dataset of the Hub."""
        if "\0" not in text and parse_hub_dataset_id_or_none(text) is not None:
            return text
        return self.relative(self.resolve(text))

    def resolve_base(self, text: str) -> str:
        """Return the base that a browser names: an alias or Hub id as it is, a path if it is in the working folder."""
        name = text.strip()
        if not name or name.startswith("-"):
            raise UsageError(f"{name!r} is no base", "an alias, a Hub id, or a file or folder in the working folder")
        if name in load_known_models_by_alias():
            return name
        if os.path.lexists(self.root / name) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\0" in name:
            return self.relative(self.resolve(name))
        return name

    def open_run(self, text: str) -> RunDir:
        """Return a run folder in the working folder, whose files are in it, too; it need not have an adapter."""
        return RunDir.open(self.relative(self.resolve(text)), require_adapter=False)

    def relative(self, path: Path) -> str:
        """Return a path as commands that run in the working folder name it; it never looks like a flag."""
        text = str(path.relative_to(self.root))
        return f"./{text}" if text.startswith("-") else text

    def list_rows(self) -> list[str]:
        """Return the files that may have rows, the newest first."""
        files = [*self._walk()]
        runs = {f.parent for f in files if f.name == "recipe.yaml"}
        found = [f for f in files if f.suffix.lower() in ROW_SUFFIXES and runs.isdisjoint(f.parents)]
        return [str(f.relative_to(self.root)) for f in sorted(found, key=_age)[:MAX_LISTED]]

    def list_runs(self) -> list[str]:
        """Return the run folders, the newest first."""
        found = [f.parent for f in self._walk() if f.name == "recipe.yaml" and f.parent != self.root]
        return [str(f.relative_to(self.root)) for f in sorted(found, key=_age)[:MAX_LISTED]]

    def list_exports(self) -> list[str]:
        """Return the folders with an export, the newest first."""
        found = [f.parent for f in self._walk() if f.name == EXPORT_MANIFEST and f.parent != self.root]
        return [str(f.relative_to(self.root)) for f in sorted(found, key=_age)[:MAX_LISTED]]

    def save_upload(self, name: str, content: BinaryIO) -> str:
        """Write an uploaded file into `uploads`, under another name if there is one of that name; return its path."""
        stem, suffix = os.path.splitext(name.replace("\\", "/").rsplit("/", 1)[-1])
        if suffix.lower() not in ROW_SUFFIXES:
            is_sheet = suffix.lower() in (".xlsx", ".xls", ".ods", ".numbers")
            hint = "in the spreadsheet program choose Save as, or Export, and CSV" if is_sheet else ""
            raise UsageError(f"{name[:80]!r} has the suffix {suffix!r}", f"one of {', '.join(ROW_SUFFIXES)}", hint)
        stem = re.sub(r"[^\w. -]", "_", stem).strip(". -")[:80] or "rows"
        folder = self.root / "uploads"
        self._require_inside(folder.resolve(), "uploads")
        for number in range(1, 1000):
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}{suffix.lower()}"
            with translate_os_errors(path):
                folder.mkdir(exist_ok=True)
                try:
                    file = path.open("xb")
                except FileExistsError:
                    continue
                try:
                    with file:
                        shutil.copyfileobj(content, file)
                except BaseException:
                    path.unlink()
                    raise
            return self.relative(path)
        raise RunError(f"uploads has a thousand files called {stem}{suffix}", hint="delete some of them")

    def find_ratings_file(self, run: str) -> Path:
        """Return the file of the rated answers of a run; it need not exist."""
        path = self.root / RATINGS / (re.sub(r"[^\w.-]+", "-", run).strip(".-") + ".jsonl")
        self._require_inside(path.resolve(), str(path.relative_to(self.root)))
        return path

    def write_rating(self, run: str, row: Mapping[str, Any], replaced: Mapping[str, Any] | None) -> str:
        """Add a rated answer to the file of a run, in place of an earlier rating of it; return the file."""
        path = self.find_ratings_file(run)
        with translate_os_errors(path):
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            if replaced is not None and (old := to_json(replaced)) in lines:
                lines.remove(old)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(f"{line}\n" for line in [*lines, to_json(row)]))
        return self.relative(path)

    def load_choices(self) -> dict[str, str]:
        """Return what was chosen last, by the names of the forms' fields."""
        try:
            values: Mapping[str, Any] = read_json_object(self.root / STATE_FILE)
        except RunError:
            return {}
        return {k: v for k, v in values.items() if isinstance(v, str)}

    def save_choices(self, choices: Mapping[str, str]) -> None:
        """Keep what was chosen for the next start of the page."""
        write_json(self.root / STATE_FILE, dict(choices))

    def _require_inside(self, real: Path, text: str) -> None:
        if not real.is_relative_to(self.root):
            expected = f"a path in {self.root.name}, the folder that slimtune ui was started for"
            raise UsageError(f"{text!r} is outside the working folder", expected, "copy it there")

    def _walk(self) -> Iterator[Path]:
        """Yield files up to `MAX_DEPTH` folders deep that are no links, without hidden folders and checkpoints."""
        count = 0
        for folder, folders, names in os.walk(self.root):
            here = Path(folder)
            depth = len(here.relative_to(self.root).parts)
            folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in SKIPPED and depth < MAX_DEPTH)
            for name in sorted(names):
                count += 1
                if count > 20 * MAX_LISTED:
                    return
                if not name.startswith(".") and not (here / name).is_symlink():
                    yield here / name


def _age(path: Path) -> tuple[float, str]:
    return -path.stat().st_mtime, str(path)
