"""Messages of commands in the page's words: its fields in place of flags and of the recipe's settings."""

import itertools
import re

from .form_fields import BASE, ROWS, ROWS_FIELDS, RUN_FIELDS, SETTINGS

OTHER_FIELDS = {
    BASE: "Base model",
    ROWS: "Rows",
    "output_dir": "New run",
    "data.columns": "the columns",
}
"""Label of each setting that is no field of settings."""

FLAG = re.compile(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)(?:[ =]('[^']*'|\"[^\"]*\"|[\w.=/:,{}-]*[\w}/]))?")
COMMAND = re.compile(r"(\bslimtune [a-z][^;\n]*)")
SETTING = re.compile(r"\b(?:model|data|task|method|train)\.[a-z_]+\b")
PAGE_FLAGS = {
    "force": "the box that trains in spite of it",
    "gpu": "Machine",
    "generate": "Answers to read",
    "resume": "Resume",
    "split": "Rows that were kept",
}
"""What the page has in place of flags that are no settings."""


def name_page_fields(text: str) -> str:
    """Return a message of a command with the page's fields in place of its flags and settings.

    A flag of a setting without a field becomes the line that `More settings` takes. A command is left as it is.
    """
    labels = {**OTHER_FIELDS, **ROWS_FIELDS, **RUN_FIELDS}

    def name_flag(found: re.Match[str]) -> str:
        flag, value = found[1], found[2] or ""
        rest = found[0].removeprefix(f"--{flag}")
        if flag == "set" and "=" in value:
            return f"More settings: {value}"
        if flag == "column":
            return value.strip("'\"").replace("=", ": ") or "the columns"
        if flag in PAGE_FLAGS:
            return f"{PAGE_FLAGS[flag]}{rest}"
        setting = next((s for s in SETTINGS.values() if s.flag in (f"--{flag}", f"--{flag.removeprefix('no-')}")), None)
        if setting is None:
            return found[0]
        is_value = bool(value) and (value in setting.list_choices() or bool(re.search(r"\d|^['\"]", value)))
        if setting.path in labels:
            return labels[setting.path] + (f": {value}" if is_value else rest)
        if bool in setting.kinds:
            return f"More settings: {setting.path}={str(not flag.startswith('no-')).lower()}{rest}"
        return f"More settings: {setting.path}{f'={value}' if is_value else rest}"

    parts = COMMAND.split(text)  # every second one is a command
    named = [
        SETTING.sub(lambda found: labels.get(found[0], found[0]), FLAG.sub(name_flag, part)) for part in parts[::2]
    ]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(named, parts[1::2], fillvalue="")))


def list_page_fields(command: str) -> list[str]:
    """Return the settings of a command of training as the page's fields: `["Learning rate: 3e-4"]`."""
    flags = [found[0] for found in FLAG.finditer(command) if found[1] not in ("out", "data", "model")]
    return [name_page_fields(flag) for flag in flags]
