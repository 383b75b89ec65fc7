"""report.html: a run on one page, made from its folder's files alone, so that whoever adds one writes it anew."""

from __future__ import annotations

from .page import page_of, write_report
from .versions import versions

__all__ = ["page_of", "versions", "write_report"]
