"""Plans of an 8B base with chosen figures, for tests of what shows plans."""

from typing import Any

from slimtune.planning.gpu_specs import GpuSpec, require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.plan_result import PARTS, MemorySaving, ResourceEstimate

GIB = 1 << 30
SIZES = (15.0, 0.25, 0.25, 0.5, 1.5, 0.5, 0.5)
"""GiB by part; 18.5 in all."""


def hand_plan(
    method: str = "lora", card: GpuSpec | None = None, sizes: tuple[float, ...] = SIZES, **fields: Any
) -> ResourceEstimate:
    """Return a plan with these sizes in GiB; the allocator takes 0.1 to 0.5 GiB more."""
    card = require_gpu_by_name("rtx-3090") if card is None else card
    parts = {part: int(size * GIB) for part, size in zip(PARTS, sizes, strict=True)}
    allocated = sum(parts.values()) - parts["runtime"]
    made: dict[str, Any] = {
        "model": "llama-3.1-8b",
        "method": method,
        "gpu": card.name,
        "dtype": "bfloat16",
        "batch": 1,
        "seq_len": 2048,
        "max_tokens_per_micro_batch": 2048,
        "micro_batches": 4,
        "trainable_params": 41_943_040,
        "total_params": 8_072_204_288,
        "adapter_bytes": 160 << 20,
        "adapter_bytes_at_most": False,
        "parts": parts,
        "allocated_bytes": allocated,
        "reserved_bytes": Interval(allocated + 0.1 * GIB, allocated + 0.5 * GIB),
        "runtime_bytes": Interval(parts["runtime"], parts["runtime"]),
        "usable_bytes": card.usable,
        "peaks": {"forward": allocated},
        "host_bytes": 3 * GIB,
        "disk_bytes": 1 * GIB,
        "verdict": "fits",
        "reason": "it needs 18.6 GiB to 19.0 GiB of 22.9 GiB",
        "max_seq_len": 6144,
        "max_batch_size": 3,
        "tokens_per_second": Interval(1000.0, 2000.0),
        "advice": [MemorySaving("--quantization nf4", 10 * GIB, "fits")],
        "evidence": {
            "parts": "traced; runtime: guessed",
            "usable_bytes": "published (a page (its part)); guessed band",
        },
    }
    return ResourceEstimate(**{**made, **fields})


FULL = (15.0, 0.0, 15.0, 30.0, 1.5, 0.5, 0.5)
