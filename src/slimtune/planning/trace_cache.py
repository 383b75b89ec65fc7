"""Traces of earlier plans, kept on the disk: a plan of the same base and settings needs no trace.

    ~/.cache/slimtune/traces/<SHA-256 of the key>.json     {"sha256": of the trace as JSON, "trace": …}

The key says everything that a trace depends on: the base's config, the method's settings, the job, the versions of the
packages, and the state of slimtune's own files. What is kept does not depend on the GPU's memory, so verdicts are
always new. A file that is damaged, or cannot be read or written, is as if it were not there. `SLIMTUNE_TRACES` names
another folder; /dev/null keeps nothing. Bases and methods with code of their own are not kept: code can change.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.files import write_atomic
from ..core.foundation.installed_versions import read_installed_versions
from ..extras.gguf_loading import get_slimtune_cache_root
from .memory_trace import StepTrace
from .plan_request import MicroBatchWorkload

T = TypeVar("T")
MAX_FILES = 2000
"""A plan keeps about six files of 10 KB. If there are more files than this, the older half is deleted."""
PACKAGE = Path(__file__).parents[1]
KNOWN = {"slimtune", "peft", "transformers", "builtins"}
"""Packages whose classes are in the key by their versions."""


def load_or_compute_trace(job: MicroBatchWorkload, compute_trace: Callable[[], T], **options: Any) -> T:
    """Return what `compute_trace()` returns, a StepTrace or a number of bytes, from the disk if it is there.

    `options` are what it depends on besides the job.
    """
    if (key := _describe(job, options)) is None:
        return compute_trace()
    folder = Path(os.environ.get("SLIMTUNE_TRACES") or get_slimtune_cache_root() / "traces")
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # not there, or damaged
        kept = json.loads(file.read_text())
        if kept["sha256"] == _hash_json(kept["trace"]):
            return _from_json(kept["trace"])
    found = compute_trace()
    values = _to_json(found)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if len(files := list(folder.glob("*.json"))) > MAX_FILES:
            for old in sorted(files, key=lambda f: f.stat().st_mtime)[: MAX_FILES // 2]:
                old.unlink(missing_ok=True)
        write_atomic(file, json.dumps({"sha256": _hash_json(values), "trace": values}, allow_nan=False))
    return found


def _describe(job: MicroBatchWorkload, options: dict[str, Any]) -> str | None:
    """Return the key as text; None if a part of it has code of its own, or a value that is not plain."""
    config, method = job.base_config, job.method
    classes = [f"{c.__module__}.{c.__qualname__}" for c in (type(config), *type(method).__mro__)]
    if not classes[0].startswith("transformers.") or any(c.partition(".")[0] not in KNOWN for c in classes[1:]):
        return None
    others = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.name not in ("base_config", "method")}
    implementations = [getattr(config, f"_{what}_implementation", None) for what in ("attn", "experts")]
    values = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}  # the same base in another folder
    key = {"classes": classes, "config": values, "implementations": implementations, "method": vars(method),
           "job": others, "options": options, "environment": _describe_environment(),
           "threads": torch.get_num_threads() if job.device == "cpu" else 0}  # fmt: skip

    def to_plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, torch.dtype):
            return str(value)
        if dataclasses.is_dataclass(value):  # settings inside of settings, as LoRA's eva_config
            return {"class": type(value).__name__, **vars(value)}
        raise TypeError(type(value))

    try:
        # Configs of Mamba layers have Inf (time_step_limit); only a hash of this text is kept.
        return json.dumps(key, sort_keys=True, default=to_plain, allow_nan=True)
    except (TypeError, ValueError):
        return None


@cache
def _describe_environment() -> dict[str, object]:
    files = sorted((str(f.relative_to(PACKAGE)), f.stat()) for f in PACKAGE.rglob("*.py"))
    state = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in files]
    return {
        "versions": read_installed_versions(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "files": _hash_json(state),
    }


def _hash_json(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, allow_nan=False).encode()).hexdigest()


def _to_json(found: Any) -> Any:
    if not isinstance(found, StepTrace):
        return found
    # In the order in which operators came: the times of a plan are sums in this order.
    counts = [
        [flops, moved, dtype_name(dtype), n] for (flops, moved, dtype), n in found.counts_by_operator_cost.items()
    ]
    attention = [[dtype_name(dtype), flops] for dtype, flops in found.attention_flops_by_dtype.items()]
    return {**vars(found), "counts_by_operator_cost": counts, "attention_flops_by_dtype": attention}


def _from_json(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    counts = {(flops, moved, getattr(torch, dtype)): n for flops, moved, dtype, n in values["counts_by_operator_cost"]}
    attention = {getattr(torch, dtype): flops for dtype, flops in values["attention_flops_by_dtype"]}
    return StepTrace(
        **{**values, "counts_by_operator_cost": Counter(counts), "attention_flops_by_dtype": Counter(attention)}
    )
