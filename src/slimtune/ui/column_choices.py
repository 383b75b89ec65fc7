"""Which columns of the chosen rows have which role: drop-downs filled from the file, the guess of the commands chosen.

A guess is only what a drop-down shows first. What is read is what the form sends.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.config.objective_registry import list_objectives, load_objective_class
from ..core.foundation.files import parse_hub_dataset_id_or_none, parse_json
from ..errors import SlimtuneError
from ..extras.column_guesses import list_hinted_roles
from ..extras.column_preview import ColumnPreview
from ..extras.row_columns import load_row_formats
from .workspace import WorkspaceFolder

FORMAT, TASK, COLUMN = "data.format", "task.name", "column."
"""Names of the fields; that of a role is `column.ROLE`."""
ROLE_HELP = {
    "messages": "the conversation, as a list of messages",
    "conversations": "the conversation, as a list of turns",
    "system": "what the model is told before the question",
    "completions": "the answers with their scores, as a list",
    "responses": "the answers, as a list",
    "scores": "their scores, as a list",
    "rankings": "their ranks, as a list",
    "tools": "functions that the model may call, as a list",
}
ROLE_LABELS = {
    "instruction": "Question (instruction)",
    "output": "Answer (output)",
    "input": "More of the question (input)",
    "system": "System message",
    "prompt": "Question (prompt)",
    "completion": "Answer (completion)",
    "chosen": "Better answer (chosen)",
    "rejected": "Worse answer (rejected)",
    "label": "Label",
}
"""Labels of the drop-downs; of another role its own name."""
FORMAT_LABELS = {
    "instruction": "question and answer (instruction)",
    "prompt-completion": "question and answer (prompt-completion)",
    "chat": "conversation (chat)",
    "sharegpt": "conversation (sharegpt)",
    "text": "plain text (text)",
    "document": "long text (document)",
    "preference": "better and worse answer (preference)",
}
"""What the formats are called; another one by its own name."""
LABEL_HELP = {"unpaired-preference": "whether the answer is good: up, down, yes, no, 1, 0 …"}
"""What a label says, where it is not a class."""
PREVIEW_SECONDS = 30


@dataclass(frozen=True)
class RoleField:
    """The drop-down for a role of a format."""

    role: str
    """The role, such as "output"."""
    label: str
    """What its drop-down is called."""
    help: str
    """What it is; empty: the label says it."""
    required: bool
    """Whether rows of the format must have it."""
    column: str
    """The column that was chosen, else the one that is guessed; empty: none."""


@dataclass(frozen=True)
class ColumnForm:
    """The fields that say how the columns of the chosen rows are read."""

    file: str = ""
    """The rows."""
    bytes: int | None = None
    """Size of the file; None: it is a folder, or not here."""
    preview: ColumnPreview = field(default_factory=ColumnPreview)
    """What is in it."""
    formats: Sequence[str] = ()
    """The formats that the objective takes."""
    format: str = ""
    """The format that is chosen; empty: the one that is recognized."""
    roles: Sequence[RoleField] = ()
    """The drop-downs."""


def run_preview_process(path: Path) -> ColumnPreview:
    """Return what a file's columns hold, read in a process of its own: a damaged file may take memory or time."""
    command = [sys.executable, "-m", "slimtune.extras.column_preview", str(path)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PREVIEW_SECONDS)
        return ColumnPreview(**parse_json(done.stdout))
    except (subprocess.TimeoutExpired, ValueError, TypeError):
        return ColumnPreview(error="its columns cannot be read here; `Check the rows` may say why")


class ColumnFormBuilder:
    """Makes the form of the chosen rows; the last file that was looked into is remembered.

    Args:
        workspace: the working folder.
        read_preview: looks into a file.
    """

    def __init__(
        self, workspace: WorkspaceFolder, read_preview: Callable[[Path], ColumnPreview] = run_preview_process
    ) -> None:
        self.workspace, self.read_preview = workspace, read_preview
        self._last: tuple[object, ColumnPreview] = (None, ColumnPreview())

    def build(self, rows: str, choices: Mapping[str, str]) -> ColumnForm:
        """Return the form for rows; a path that is wrong is an error in its preview."""
        if not rows.strip():
            return ColumnForm()
        task = choices.get(TASK, "") if choices.get(TASK) in list_objectives() else "sft"
        objective = load_objective_class(task)
        formats = [*objective.formats, *objective.named_formats]
        size, preview = None, ColumnPreview()
        try:
            if "\0" in rows or parse_hub_dataset_id_or_none(rows) is None:
                path = self.workspace.resolve(rows)
                size = path.stat().st_size if path.is_file() else None
                preview = self._look_into(path)
        except SlimtuneError as e:
            return ColumnForm(rows, preview=ColumnPreview(error=e.message), formats=formats)
        chosen = choices.get(FORMAT, "")
        if chosen not in formats:
            chosen = _choose_format(preview, formats)
        roles = _make_role_fields(chosen or preview.format or formats[0], preview, choices)
        return ColumnForm(rows, size, preview, formats, "" if chosen == preview.format else chosen, roles)

    def _look_into(self, path: Path) -> ColumnPreview:
        facts = path.stat()
        key = (path, facts.st_mtime_ns, facts.st_size)
        if self._last[0] != key:
            self._last = (key, self.read_preview(path))
        return self._last[1]


def _choose_format(preview: ColumnPreview, formats: Sequence[str]) -> str:
    """Return the format that rows of an objective most probably have."""
    for name in (preview.format, preview.suggested_format):
        if name in formats:
            return str(name)
    known = load_row_formats()
    full = [f for f in formats if {*list_hinted_roles(f, known[f].required)} <= {*preview.guesses.get(f, ())}]
    return next(iter(full), "instruction" if "instruction" in formats else formats[0])


def _make_role_fields(format: str, preview: ColumnPreview, choices: Mapping[str, str]) -> list[RoleField]:
    known = load_row_formats()[format]
    needed = list_hinted_roles(format, known.required)
    guess = preview.guesses.get(format, {})
    fields = []
    for role in dict.fromkeys((*needed, *known.required, *known.optional)):
        chosen = choices.get(COLUMN + role)
        if chosen is None or (preview.columns and chosen not in ("", *preview.columns)):
            chosen = guess.get(role, "")
        help = LABEL_HELP.get(format, "its class") if role == "label" else ROLE_HELP.get(role, "")
        fields.append(RoleField(role, ROLE_LABELS.get(role, role.capitalize()), help, role in known.required, chosen))
    return fields


def make_column_arguments(choices: Mapping[str, str]) -> list[str]:
    """Return the chosen columns as flags of a command; a column that has the role's own name needs none."""
    roles = {name.removeprefix(COLUMN): column for name, column in choices.items() if name.startswith(COLUMN)}
    return [f"--column={role}={column}" for role, column in roles.items() if column and column != role]
