"""`slimtune doctor`: what is wrong with this machine, and what it offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..core.foundation.formatting import escape_control_characters
from .common import ERROR, WARNING, Json, make_console, print_fields

if TYPE_CHECKING:
    from ..diagnostics.doctor_report import DoctorReport


def doctor(as_json: Json = False) -> Any:
    """Find what is wrong with this machine, and what mends it.

    Looks at GPUs, drivers, torch's build, limits of containers and shells, disks, Ollama and the Hub's token. Then: the
    device and dtype that auto chooses, versions, and what can be installed. Asks nothing of the internet.
    """
    from ..diagnostics.doctor_report import make_doctor_report

    report = make_doctor_report()
    if not as_json:
        _print_findings(report)
        print_fields(report.lines())
        if missing := report.list_missing_extras():
            make_console().print(Text("\nto add:", "bold"))
            print_fields(missing)
    return report


def _print_findings(report: DoctorReport) -> None:
    screen = make_console()
    screen.print(Text(report.headline(), "bold"))
    for finding in report.findings:
        kind = ("fault: ", ERROR) if finding.is_fault else ("warning: ", WARNING)
        screen.print(Text.assemble("\n", kind, escape_control_characters(finding.problem)))
        print_fields([("  seen:", finding.evidence)], gap=1)
        for number, command in enumerate(finding.commands):  # a command to copy stays in one line
            screen.print(f"{'        ' if number else '  mend: '}{command}", soft_wrap=True)
        screen.print(f"  more: slimtune explain {finding.page}")
    if report.findings:
        screen.print()
