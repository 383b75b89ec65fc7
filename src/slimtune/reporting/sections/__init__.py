"""The page's sections in their order: one file each, and a template of the same name."""

from __future__ import annotations

from . import asked, compared, course, forgetting, made, planned, rows, samples, shipping

ORDER = (asked, planned, rows, course, compared, samples, forgetting, shipping, made)
