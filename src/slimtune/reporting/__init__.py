"""report.html: a run on one page, made from its folder's files alone, so that whoever adds one writes it anew."""

from __future__ import annotations

from .page import render_page, write_report
from .versions import versions

__all__ = ["render_page", "versions", "write_report"]
