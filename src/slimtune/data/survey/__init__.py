"""A survey of a file of rows: one report before any training, of everything in the data that would spoil it.

    rows → read, rendered, tokenized, masked → look (a batch) → Survey (the file) → report

One pass, each row's text gone after it; of a row stay about 200 bytes, so that a million rows take 200 MB.
"""

from __future__ import annotations

from .survey import Survey
from .words import finding_text, refuse_faulty, verdict_text

__all__ = ["Survey", "finding_text", "refuse_faulty", "verdict_text"]
