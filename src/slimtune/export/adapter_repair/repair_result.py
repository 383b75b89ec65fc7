"""What `slimtune repair` did, and what the check says of the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...core.foundation.formatting import format_bytes
from ..adapter_check.adapter_findings import AdapterFileCheck
from ..export_results import EngineVerdict

WrittenForm = Literal["adapter", "merged"]


@dataclass(frozen=True)
class AppliedMend:
    """One thing that was mended."""

    code: str
    """The finding of `slimtune check`."""
    found: str
    """What the file had."""
    mend: str
    """What was done about it."""


@dataclass(frozen=True)
class RepairResult:
    """What `repair --json` prints."""

    adapter: str
    """The adapter folder, which is unchanged."""
    base: str
    """The base it was compared with."""
    engine: str
    """What the file is for: `--for`."""
    out: str
    """The folder that was written."""
    form: WrittenForm
    """An adapter beside its base, or base and adapter as one model."""
    merged_because: list[str]
    """Why it is one model, one clause each."""
    mended: list[AppliedMend]
    """What was mended, in this order."""
    files: dict[str, int]
    """Bytes by name."""
    check: AdapterFileCheck
    """What `slimtune check` says of the mended adapter, from which the folder was written."""
    proof: EngineVerdict
    """The comparison of what was written with the mended adapter, by log-probabilities."""
    commands: list[str]
    """Shell lines that use it."""
    notes: list[str]
    """What the user should know, one sentence each."""

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        for mend in self.mended:
            yield f"{mend.code}: {mend.found}"
            yield f"  mended: {mend.mend}"
        if not self.mended:
            yield "nothing was wrong with the file"
        yield from (f"merged into the base: {reason}" for reason in self.merged_because)
        yield ""
        yield from (f"{self.out}/{name}  {format_bytes(size)}" for name, size in self.files.items())
        yield from (f"note: {note}" for note in self.notes)
        yield ""
        faults = [f for f in self.check.findings if f.severity == "fault"]
        yield f"checked again: {len(faults)} faults"
        yield from (f"warning: {f.code}: {f.found}" for f in self.check.findings)
