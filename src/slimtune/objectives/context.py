"""Context distillation: what a text in the prompt makes the model do, without the text (Snell et al. 2022, 2209.15189).

    teacher   the base, without the adapter, with the context before the row's prompt
    student   the same base, with the adapter, without the context
    loss      divergence of the student's next-token distribution from the teacher's, over the tokens of the answers

The answers are those of the rows; rows without answers are answered by the teacher, once. One model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..core.adapters.config_fields import FieldError, config_field
from ..core.config.schema import Number
from ..errors import DataError, UsageError, suggest
from .teacher_objective import BETA_HELP, TeacherObjective

if TYPE_CHECKING:
    from ..core.data.rows import Row

CONTEXT_SUFFIXES = (".txt", ".md")


@dataclass
class Context(TeacherObjective):
    """Bakes a system prompt, a manual or examples into an adapter; TRL's names of GKD."""

    name: ClassVar[str] = "context"
    summary: ClassVar[str] = "to answer as with a text in the prompt, without it (context distillation)"
    formats: ClassVar[tuple[str, ...]] = (*TeacherObjective.formats, "prompt")

    beta: Number = config_field(0.0, BETA_HELP, ge=0, le=1)
    context: str = config_field("", "the text to do without, or a .txt or .md file with it")

    @property
    def context_file(self) -> Path | None:
        """The file of the context; None: the setting is the text itself."""
        path = self.context.strip()
        return Path(path).expanduser() if "\n" not in path and path.endswith(CONTEXT_SUFFIXES) else None

    def normalize(self) -> None:
        if self.context_file is not None and self.context_file.is_file():
            self.context = str(self.context_file.absolute())

    def find_missing(self) -> Iterator[FieldError]:
        if not self.context.strip():
            yield self.error("context", "a text that the model should do without", "--context prompt.txt")

    @cached_property
    def context_text(self) -> str:
        """The text of the context; its file is read once.

        Raises:
            UsageError: its file does not exist.
            DataError: the file is empty, or no text.
        """
        path = self.context_file
        if path is None:
            return self.context.strip()
        if not path.is_file():
            files = path.parent.iterdir() if path.parent.is_dir() else ()
            near = suggest(path.name, [p.name for p in files if p.suffix in CONTEXT_SUFFIXES])
            message = f"task.context is {self.context}, and there is no file {path}{near}"
            raise UsageError(message, "a text, or a .txt or .md file with it", field="task.context")
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text ({error})", "a text file in UTF-8") from error
        if not text:
            raise DataError(f"{path} is empty", "a text that the model should do without")
        return text

    def make_teacher_row(self, row: Row) -> Row:
        """Return a row with the context as its system turn, before the row's own, or before the prompt of a text."""
        context = self.context_text
        if not row.messages:
            return replace(row, prompt=f"{context}\n\n{row.prompt or ''}")
        first, *rest = row.messages
        if first["role"] in ("system", "developer"):
            return replace(row, messages=[{**first, "content": f"{context}\n\n{first['content']}"}, *rest])
        learned = None if row.learned is None else (False, *row.learned)
        return replace(row, messages=[{"role": "system", "content": context}, *row.messages], learned=learned)
