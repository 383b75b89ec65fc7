"""Training speed: a roofline over the traced operators.

An operator takes as long as its arithmetic or its memory traffic, whichever is more, and at least a kernel launch:

    seconds = Σ max(operations / rate of its dtype, bytes / bandwidth, KERNEL_LAUNCH_S)

Real runs take longer. This sum is 0.38 to 0.95 of what published runs took (`UTILIZATION`), from rows of 100 tokens to
8192, 1B to 70B, Apple's M1 to an H100. That is the range of an estimate.
"""

from ..core.foundation.dtype_names import dtype_name
from .gpu_specs import GpuSpec
from .interval import Interval
from .plan_result import TrainingWorkload

UTILIZATION = Interval(0.38, 0.95)
"""The roofline's seconds divided by those of published runs (benchmarks/data/pace_points.json), nine in ten of them."""
KERNEL_LAUNCH_S = 8e-6
"""Seconds to launch a kernel from eager PyTorch; it limits rows of a few hundred tokens (LoRA on Qwen 1.8B took 125 ms
a micro-batch at 256 tokens, and no less at 512)."""


def estimate_training_speed(workload: TrainingWorkload, gpu: GpuSpec) -> Interval | None:
    """Return trained tokens a second of a run on a GPU; None if the GPU's rates are unknown.

    Only a measured GPU has a speed for fused attention; for the others it is part of `UTILIZATION`.
    """
    if gpu.measured is not None:
        seconds = gpu.measured.estimate_step_seconds(workload)
        return Interval(*(end * workload.tokens_per_micro_batch / seconds for end in gpu.measured.training.spread))
    if not gpu.rates:
        return None
    bandwidth = gpu.bandwidth or float("inf")
    seconds = workload.optimizer_step_bytes / bandwidth / workload.micro_batches_per_step
    for (operations, moved, dtype), count in workload.counts_by_operator_cost.items():
        # A dtype that the GPU has no units for runs at the rate of float32.
        rate = gpu.rates.get(dtype_name(dtype)) or gpu.rates["float32"]
        seconds += count * max(operations / rate, moved / bandwidth, KERNEL_LAUNCH_S)
    return Interval(
        UTILIZATION.low * workload.tokens_per_micro_batch / seconds,
        UTILIZATION.high * workload.tokens_per_micro_batch / seconds,
    )
