"""Which of the known bases run and train on a machine: serving is planned here, training needs are shipped.

`training_needs.json` has the bytes that LoRA with its defaults needs on each known base, one row of 1,024 tokens with
gradient checkpointing, by kind of device and by how the base's weights are held:
`docs/internals/make_training_needs.py` writes it, and a test plans some of them again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ..core.models.base_config import load_base_config
from ..core.models.load_errors import silencing_model_loading
from ..errors import SlimtuneError
from .gpu_specs import GpuSpec
from .interval import Interval
from .known_bases import KnownBaseFacts
from .plan_result import MemoryVerdict, ServingEstimate
from .planner import judge_memory_fit
from .serving_memory import estimate_serving_memory

ROW_TOKENS = 1024
"""Of the row that training needs are for."""


@dataclass(frozen=True)
class TrainingFit:
    """How LoRA trains a base on a machine."""

    weights: str
    """How the base's weights are held: bfloat16, or nf4 where only that fits."""
    need_bytes: Interval
    """What the run needs."""
    verdict: MemoryVerdict
    """Whether the machine has it."""


@dataclass(frozen=True)
class KnownBaseFit:
    """Whether a base runs and trains on a machine."""

    name: str
    """The base's short name."""
    params: int
    """Its numbers."""
    released: str
    """Month in which it came out."""
    serving: ServingEstimate | None
    """Of the engine's default precision and context; null: not planned."""
    training: TrainingFit | None
    """LoRA with its defaults; null: not planned on this kind of device."""
    reason: str
    """Why serving is not planned, else ""."""

    @property
    def fits(self) -> bool:
        """Whether it runs or trains, surely or perhaps."""
        verdicts = {part.verdict for part in (self.serving, self.training) if part is not None}
        return bool(verdicts & {"fits", "tight"})


@dataclass(frozen=True)
class KnownBaseFits:
    """What `models --fits --json` prints."""

    gpu: str
    """The machine's GPU."""
    models: list[KnownBaseFit]
    """The bases, the largest first."""


@cache
def load_training_needs() -> dict[str, dict[str, Interval]]:
    """Return the bytes that training needs, by base and by device and weights, as `cuda nf4`."""
    text = (files(__package__) / "training_needs.json").read_text(encoding="utf-8")
    needs = json.loads(text)
    return {base: {way: Interval(*ends) for way, ends in ways.items()} for base, ways in needs.items()}


def find_training_fit(base: str, gpu: GpuSpec) -> TrainingFit | None:
    """Return how LoRA trains a base on a GPU: in bfloat16 if that fits, else in NF4; None: it is not known."""
    needs = load_training_needs().get(base, {})
    if not gpu.trains or not gpu.bf16:
        return None
    ways = [TrainingFit(way, needs[key], judge_memory_fit(needs[key], gpu.usable))
            for way in ("bfloat16", "nf4") if (key := f"{gpu.device} {way}") in needs]  # fmt: skip
    surely, perhaps = ([f for f in ways if f.verdict == verdict] for verdict in ("fits", "tight"))
    return next(iter([*surely, *perhaps, *reversed(ways)]), None)


def find_known_base_fits(bases: list[KnownBaseFacts], gpu: GpuSpec) -> Iterator[KnownBaseFit]:
    """Yield whether each base runs and trains on a GPU, the largest first."""
    for base in sorted(bases, key=lambda b: (-b.params, b.name)):
        serving, reason = None, ""
        try:
            with silencing_model_loading():  # transformers tells of configs, which no reader of the table asked about
                serving = estimate_serving_memory(load_base_config(base.name).config, gpu=gpu)
        except SlimtuneError as error:
            reason = error.message
        training = find_training_fit(base.name, gpu)
        yield KnownBaseFit(base.name, base.params, base.released, serving, training, reason)
