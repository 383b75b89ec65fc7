"""The manifest of an export folder: what it is and which run it was made from. `slimtune verify FOLDER` reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.foundation.files import read_json_object, write_json
from ..core.foundation.json_results import INLINE, from_json_dict
from ..errors import UsageError
from .export_format import EXPORT_FORMATS, ExportFormat

EXPORT_MANIFEST = "export_manifest.json"


@dataclass(frozen=True)
class ExportManifest:
    """What an export folder says about itself."""

    kind: str
    """The format."""
    run: Path
    """The run or adapter folder that it was made from."""
    values: Mapping[str, Any] = field(default_factory=dict, metadata=INLINE)
    """Facts of the format."""

    def load_format(self) -> type[ExportFormat] | None:
        """Return the format's class; None if it is not installed."""
        return EXPORT_FORMATS.load(self.kind) if self.kind in EXPORT_FORMATS.names() else None

    def read_facts(self) -> Any:
        """Return the facts as the format's dataclass.

        Raises:
            UsageError: the format is not installed, or a fact is missing.
        """
        kind = self.load_format()
        if kind is None:
            raise UsageError(f"there is no export format {self.kind!r} here", "the package that wrote the folder")
        try:
            return from_json_dict(kind.facts, self.values, strict=False)
        except ValueError as e:
            raise UsageError(f"{EXPORT_MANIFEST} is damaged: {e}", "what an export writes", "export again") from None


def write_export_manifest(folder: Path, kind: str, run: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: the format's name, the run or adapter folder, and facts of the format."""
    write_json(folder / EXPORT_MANIFEST, ExportManifest(kind, run.resolve(), facts))


def read_export_manifest(folder: Path) -> ExportManifest | None:
    """Return the manifest; None if the folder has none.

    Raises:
        RunError: it is damaged.
        UsageError: it does not say what it was made from.
    """
    file = folder / EXPORT_MANIFEST
    if not file.is_file():
        return None
    values = read_json_object(file)
    try:
        return from_json_dict(ExportManifest, values)
    except ValueError:
        raise UsageError(f"{file} has no kind and run", "the manifest that an export writes", "export again") from None
