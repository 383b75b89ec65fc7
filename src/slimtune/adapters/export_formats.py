"""Where an adapter can go: what each way out asks of it. Its deltas and its config answer, no list of methods does.

What a way asks of the base (an architecture that llama.cpp or vLLM knows) is asked when it is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import format_names

Factors = tuple[Tensor, Tensor, float]
"""`A (r, in)`, `B (out, r)` and the scale of an update."""


@dataclass(frozen=True)
class ExportFormats:
    """What an adapter can become.

    Args:
        merged: base and adapter as one model.
        gguf: a GGUF that llama.cpp, and so Ollama, adds to the base.
        vllm: a LoRA that vLLM adds to the base.
        as_lora: the nearest LoRA, which vLLM takes.
    """

    merged: bool
    gguf: bool
    vllm: bool
    as_lora: bool


def get_export_formats(model: Any, adapter: str = "default", *, beside: bool = True) -> ExportFormats:
    """Return the ways of a model's adapter.

    Args:
        model: the adapted model.
        adapter: the adapter's name.
        beside: whether it may stand beside another base than the one in memory; a LoftQ start may not.
    """
    config = model.peft_config[adapter]
    kinds = set(model._attached.reports[adapter].kinds.values())
    maps, other = collect_low_rank_factors(model, adapter)
    taken = beside and not lora_incompatibilities(config)
    merged = config.mergeable and all(d.has_base_parameter for d in model._attached.deltas(adapter).values())
    return ExportFormats(
        merged=merged,
        gguf=beside and bool(maps) and not other,
        vllm=taken and not plain_lora_incompatibilities(config),
        as_lora=taken and merged and kinds <= {"linear", "embedding"},
    )


def collect_low_rank_factors(model: Any, adapter: str = "default") -> tuple[dict[str, Factors], list[str]]:
    """Return an adapter's updates at linear maps by module, in the model's order, and what else it does."""
    maps: dict[str, Factors] = {}
    other: list[str] = []
    for name, module in model._attached.members[adapter]:
        kind = model._attached.reports[adapter].kinds.get(name)
        if adapter in module.trained_copies:
            other.append(
                f"{name} ({format_names(n for n, _ in module.trained_copies[adapter].named_parameters())} trained whole)"
            )
        delta = module.adapters[adapter] if adapter in module.adapters else None  # noqa: SIM401 (a ModuleDict has no get)
        if delta is None:
            continue
        factors = delta.low_rank_factors() if kind == "linear" else None
        if factors is None:
            other.append(f"{name} ({type(delta).__name__})")
        else:
            maps[name] = factors
    return maps, other


def lora_incompatibilities(config: Any) -> list[str]:
    """Return what of an adapter no LoRA can stand for in vLLM, each as a sentence's part."""
    causes = []
    if saved := getattr(config, "modules_to_save", None):
        causes.append(f"modules_to_save is {saved}: vLLM takes no whole modules")
    if (bias := getattr(config, "bias", "none")) != "none":
        causes.append(f"bias is {bias!r}: vLLM takes no trained biases")
    if getattr(config, "lora_bias", False):
        causes.append("lora_bias is True: vLLM takes no bias on B")
    if tokens := getattr(config, "trainable_token_indices", None):
        causes.append(f"trainable_token_indices is {tokens}: vLLM takes no rows of an embedding")
    if getattr(config, "init_lora_weights", None) == "loftq":
        causes.append("init_lora_weights is 'loftq': it belongs to the quantized base it makes up for")
    return causes


def plain_lora_incompatibilities(config: Any) -> list[str]:
    """Return why vLLM would not take an adapter as it is, though it may take the nearest LoRA."""
    if not config.ships_as_lora:
        return [f"its method is {config.name}, and vLLM reads LoRA alone"]
    if config.use_dora:
        return ["use_dora is True: vLLM has no DoRA"]
    return []
