"""Serving a mixture that a GPU does not hold: experts of the first layers in CPU memory, as `llama.cpp --n-cpu-moe N`.

The GPU computes all but these experts. A written token reads those that its router picks from CPU memory, at the rates
that published runs reached; of a prompt, each batch of 512 tokens has them copied to the GPU. Runs and sources are in
benchmarks/data/serving_points_cpu_experts.json.
"""

import math
import re

from .interval import Interval
from .plan_result import CpuExpertsEstimate
from .serving_speed import BATCH_TOKENS, LayerStructure, ServingSpeed

READ_RATE = Interval(18e9, 66e9)
"""Bytes of experts a second that a CPU read in runs with DDR4-2133 to DDR5, two or four channels: 20 to 62 GB/s."""
COPY_RATE = Interval(9e9, 35e9)
"""Bytes a second at which experts were copied to the GPU, by PCIe 3 to 5 and 16 lanes: 10 to 32 GB/s."""


def find_expert_layers(parameter_names: list[str]) -> list[int]:
    """Return the numbers of the layers that parameters with experts are of, ascending."""
    return sorted({int(found[1]) for name in parameter_names if (found := re.search(r"\.(\d+)\.", name))})


def count_layers_on_cpu(need: float, usable: float, expert_bytes: float, expert_layers: int) -> int | None:
    """Return of how many layers the experts must be in CPU memory so that the rest fits; None: all are not enough."""
    if not expert_layers or need - usable > expert_bytes:
        return None
    return min(expert_layers, math.ceil((need - usable) * expert_layers / expert_bytes))


def estimate_cpu_experts(
    *, layers: list[int], count: int, structure: LayerStructure, need: Interval, host_bytes: int,
    speed: ServingSpeed | None, read_bytes: float,
) -> CpuExpertsEstimate:  # fmt: skip
    """Return what serving takes with the experts of the first layers in CPU memory.

    Args:
        layers: numbers of the layers with experts.
        count: of how many of them the experts are in CPU memory.
        structure: of the model.
        need: what the GPU would need for all of the model.
        host_bytes: what is in CPU memory besides.
        speed: of all but these experts on the GPU; None: not known.
        read_bytes: what a token reads of these experts.
    """
    moved = structure.all_expert_bytes * count / len(layers)
    decode = prefill = None
    if speed is not None:
        decode = _slow_down(speed.decode, read_bytes, READ_RATE)
        prefill = _slow_down(speed.prefill, moved / BATCH_TOKENS, COPY_RATE)
    return CpuExpertsEstimate(
        # llama.cpp counts layers without experts, too.
        n_cpu_moe=layers[count - 1] + 1,
        layers=count,
        expert_layers=len(layers),
        need_bytes=Interval(int(need.low - moved), int(need.high - moved)),
        host_bytes=host_bytes + int(moved),
        decode_tokens_per_second=decode,
        prefill_tokens_per_second=prefill,
    )


def _slow_down(tokens_per_second: Interval, bytes_per_token: float, rate: Interval) -> Interval:
    return Interval(
        1 / (1 / tokens_per_second.low + bytes_per_token / rate.low),
        1 / (1 / tokens_per_second.high + bytes_per_token / rate.high),
    )
