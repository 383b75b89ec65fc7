"""Which parts plug into the core, and where each one is: the only place that knows all of them.

`slimtune/__init__.py` imports this module first, so every registry of the core is filled before it is read. Nothing
here imports torch: a part is imported when it is first asked for (core/foundation/registry.py).
"""

from .core.foundation.registry import register_parts

PARTS: dict[str, dict[str, str]] = {
    "slimtune.data_reports": {"rows": "slimtune.evaluation.data_report.dataset_report:DatasetReport"},
}
"""Registry → name of the part → its dotted path."""

for group, paths in PARTS.items():
    register_parts(group, paths)
