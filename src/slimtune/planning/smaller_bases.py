"""Find a base that fits where the one that was asked for does not."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ..core.foundation.fingerprint import FACTS
from ..core.models.base_config import load_base_config
from ..errors import SlimtuneError
from ..extras.known_models import load_known_models_by_alias
from . import planner
from .plan_request import PlanRequest

MAX_PLANNED_BASES = 2
"""Bases that are planned in search of one that fits; each takes seconds."""
WEIGHT_FRACTION = 0.75
"""Largest share of the GPU's memory that the weights of a base to try may take."""
BYTES_PER_PARAMETER = {"nf4": 0.7, "nf4-single": 0.75, "int8": 1.15, "gptq": 0.75, "awq": 0.75}
"""Of a base with its 16-bit embeddings, by quantization."""
_EXPERT_FIELDS = (*FACTS["experts"].split(), "moe_num_experts")


def find_smaller_base_that_fits(request: PlanRequest) -> str | None:
    """Return the alias of a smaller dense base on which the same run fits, of the same family if possible, or None."""
    for alias in islice(_iterate_candidates(request), MAX_PLANNED_BASES):
        try:
            smaller = replace(request, model=load_base_config(alias))
            if planner.judge_run(smaller) == "fits":
                return alias
        except SlimtuneError:  # its layers have other names than the recipe's targets, or it has too few positions
            continue
    return None


def _iterate_candidates(request: PlanRequest) -> Iterator[str]:
    """Yield the dense bases whose weights leave room on the GPU: of the same family, then others, the newest first."""
    known, gpu = load_known_models_by_alias(), request.gpu
    per_parameter = BYTES_PER_PARAMETER.get(request.quantization or "", request.job().dtype.itemsize)
    largest = WEIGHT_FRACTION * (gpu.usable.low - planner.RUNTIME[gpu.device].high) / per_parameter
    own = known.get(request.model.name, {})
    largest = min(largest, own.get("params", largest))
    named = [a for a, facts in known.items() if largest / 2 <= facts["params"] < largest and not facts["gated"]]
    named.sort(key=lambda alias: (known[alias]["released"], known[alias]["params"]), reverse=True)
    named.sort(key=lambda alias: known[alias]["family"] != own.get("family"))
    yield from (alias for alias in named if not has_experts(load_base_config(alias).config))


def has_experts(config: Any) -> bool:
    """Return whether a config is one of a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in _EXPERT_FIELDS)
