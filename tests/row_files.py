"""Files of rows, and what the data report finds in them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slimtune.core.foundation.json_results import to_json_dict
from slimtune.evaluation.data_report.report_builder import make_data_report


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def find_issues(path: Path, tokenizer: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the issues of the data report by their codes."""
    report = to_json_dict(make_data_report(path, tokenizer, model="tiny", processes=1, **options))
    return {issue["code"]: issue for issue in report["issues"]}
