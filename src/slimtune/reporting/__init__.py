"""report.html: one run on one page. `charts` draws for other pages too."""

from .report import render_data_report, render_report, write_report

__all__ = ["render_data_report", "render_report", "write_report"]
