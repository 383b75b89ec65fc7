"""How a dataset of the Hub is named where a file might be: `org/name[/config][:split]`."""

import re
from pathlib import Path

_NAMED = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>[^/]+))?")
_FILES = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst|zip|arrow|xlsx?|ya?ml|jinja)$", re.IGNORECASE)


def parse_dataset_id(path: str | Path) -> tuple[str, str | None, str] | None:
    """Return the repository, its configuration and the split that a path may name; None: it is the path of a file.

    What lies on this disk is no dataset of the Hub, whatever it is called.
    """
    text = str(path)
    found = _NAMED.fullmatch(text)
    if found is None or Path(path).exists() or _FILES.search(text) or Path(text.split("/")[0]).is_dir():
        return None
    return found["name"], found["config"], found["split"] or "train"
