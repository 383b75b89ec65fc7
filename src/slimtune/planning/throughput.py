"""Training speed: a roofline over the traced operators.

An operator takes as long as its arithmetic or its memory traffic, whichever is more, and at least a kernel launch:

    seconds = Σ max(operations / rate of its dtype, bytes / bandwidth, KERNEL_LAUNCH_S)

Real runs take longer. The sum divided by what published runs took is the utilization, from rows of 64 tokens to 32768,
1B to 70B (`python benchmarks/published_hours.py`). That is the range of an estimate.
"""

from ..core.foundation.dtype_names import dtype_name
from .gpu_specs import GpuSpec
from .interval import Interval
from .plan_result import TrainingWorkload

UTILIZATION = {"nvidia": Interval(0.38, 1.03), "apple": Interval(0.17, 0.82)}
"""The roofline's seconds divided by those of published runs (benchmarks/data/pace_points.json) by vendor: where nine in
ten runs of an author lie who was left out of the fit. Apple's are four runs with rows of 100 tokens."""
GUESSED_UTILIZATION = Interval(0.2, 1.0)
"""Of GPUs by others; of AMD one run on 8 of them is known, at 0.23."""
KERNEL_LAUNCH_S = 8e-6
"""Seconds to launch a kernel from eager PyTorch; it limits rows of a few hundred tokens (LoRA on Qwen 1.8B took 125 ms
a micro-batch at 256 tokens, and no less at 512)."""


def get_utilization(gpu: GpuSpec) -> Interval:
    """Return the share of the roofline's speed that runs on a GPU reach."""
    return UTILIZATION.get(gpu.vendor, GUESSED_UTILIZATION)


def estimate_training_speed(workload: TrainingWorkload, gpu: GpuSpec) -> Interval | None:
    """Return trained tokens a second of a run on a GPU; None if the GPU's rates are unknown.

    Only a measured GPU has a speed for fused attention; for the others it is part of the utilization.
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
    return Interval(*(share * workload.tokens_per_micro_batch / seconds for share in get_utilization(gpu)))
