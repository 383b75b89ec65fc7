"""Where a page, a chart or a table that a command writes may go."""

import os
from pathlib import Path

from ..core.foundation.files import refuse_non_regular_file, require_writable
from ..errors import UsageError


def resolve_page_file(path: Path) -> Path:
    """Return the file for a page, as `resolve_output_file`; raise UsageError for one that exists and is no page."""
    file = resolve_output_file(path.expanduser())
    if file.exists() and file.stat().st_size > 0:
        with file.open("rb") as f:
            if not f.read(512).lstrip().startswith(b"<"):
                raise UsageError(f"{path} cannot be written: it exists and is no page", "a .html file", "another name")
    return file


def resolve_output_file(path: Path) -> Path:
    """Return the file that an output at `path` replaces or creates: for a link what it links to, in the same folder.

    Raises:
        UsageError: there is a folder, device or pipe, a link to another folder, or no folder to put the file into.
    """
    expected, hint = "a file in an existing folder", "give another path"
    try:
        refuse_non_regular_file(path)
        is_link, parent_exists = path.is_symlink(), path.parent.is_dir()
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}", expected, hint) from None
    if not parent_exists:
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}", expected, hint)
    require_writable(path.parent)
    if not is_link:
        return path
    target = Path(os.path.realpath(path))
    if target.parent != Path(os.path.realpath(path.parent)):
        raise UsageError(
            f"{path} is a link to {target}, in another folder", expected, "give the path of the file itself"
        )
    return target
