"""A LoRA as llama.cpp and Ollama read it beside its base: an adapter GGUF.

    y = W x + (alpha / r) · B (A x)        `blk.0.attn_q.weight.lora_a` (r, in), `….lora_b` (out, r)

llama.cpp has one alpha for the whole file and divides it by each tensor's own rank. Where the adapter's scales ask for
several (rank and alpha patterns), what is left over is multiplied into B. Every method that is low-rank at this moment
can be written: the deltas say so by their `low_rank_factors()`.

Format: llama.cpp, `src/llama-adapter.cpp` and `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapters.export_formats import collect_low_rank_factors
from ..errors import AdapterError, UsageError, format_names
from .architectures import get_architecture, get_tensor_names, package, permute_rope_rows

Precision = Literal["f32", "f16"]
DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16}
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Pair:
    """One map's update, `scale · B A`.

    Args:
        module: the map's name in the model.
        A: `(r, in)`.
        B: `(out, r)`, its rows as in the model.
        scale: the update's.
    """

    module: str
    A: Tensor
    B: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        """The alpha that gives this scale at this rank."""
        return self.scale * self.A.shape[0]


def write_adapter(file: Path, model: Any, *, adapter: str = "default", precision: Precision = "f32") -> dict[str, Any]:
    """Write an adapter as GGUF.

    Args:
        file: what to write, in a folder that is not yet in use: it is not written atomically.
        model: the adapted model.
        adapter: the adapter's name.
        precision: of the tensors, "f32" or "f16".

    Returns:
        `architecture`, `alpha`, `ranks` (each map's), `tensors`, `bytes`.

    Raises:
        UsageError: the architecture is not known, the precision is neither, or the adapter does more than add a
            low-rank product to linear maps; what to do instead is said.
        AdapterError: a number is not finite, or too large for the precision.
        ModelError: the package gguf is not installed.
    """
    if precision not in DTYPES:
        raise UsageError(f"an adapter GGUF in {precision!r}", format_names(DTYPES), "--precision f32")
    gguf, facts = package(), get_architecture(model.config)
    names, pairs = get_tensor_names(model.config), pairs_of(model, adapter)
    writer = gguf.GGUFWriter(str(file), facts.arch)
    alpha = _common([p.alpha for p in pairs])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if precision == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for pair in pairs:
        name = names.get_name(pair.module)
        if name is None:
            raise UsageError(
                f"{pair.module} has no name in GGUF for the architecture {facts.arch}",
                "adapters at the maps of attention and MLP",
                "ship it merged: slimtune merge",
            )
        for part, tensor in _tensors(pair, alpha, model.config):
            writer.add_tensor(f"{name}.weight.{part}", _stored(tensor, pair.module, precision))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "architecture": facts.arch,
        "alpha": alpha,
        "ranks": {p.module: p.A.shape[0] for p in pairs},
        "tensors": 2 * len(pairs),
        "bytes": file.stat().st_size,
    }


def pairs_of(model: Any, adapter: str = "default") -> list[Pair]:
    """Return an adapter's updates at the linear maps of a model, in the model's order.

    Raises:
        UsageError: it does something else besides; what, and the ways out, are said.
    """
    maps, other = collect_low_rank_factors(model, adapter)
    pairs = [Pair(name, A.detach(), B.detach(), scale) for name, (A, B, scale) in maps.items()]
    if other or not pairs:
        method = model.peft_config[adapter].name
        raise UsageError(
            f"the {method} adapter is no LoRA of linear maps alone: {format_names(other, 4) or 'it changes none'}",
            "scale · B A beside linear maps, which is all that llama.cpp adds to a base",
            _way_out(model, adapter),
        )
    return pairs


def _way_out(model: Any, adapter: str) -> str:
    config = model.peft_config[adapter]
    if not config.mergeable:
        return f"{config.name} cannot be merged either: use it from slimtune (generate, chat) or Python"
    return "ship it merged: --merged, or slimtune merge; or turn it into a LoRA: --as-lora RANK"


def _tensors(pair: Pair, alpha: float, config: Any) -> Iterator[tuple[str, Tensor]]:
    B = pair.B.to(torch.promote_types(pair.B.dtype, torch.float32))
    if pair.alpha != alpha:
        B = B * (pair.alpha / alpha)
    yield "lora_a", pair.A
    yield "lora_b", permute_rope_rows(B, pair.module, config)


def _common(alphas: list[float]) -> float:
    """Return the alpha most of the maps have."""
    return max(sorted(set(alphas)), key=alphas.count)


def _stored(tensor: Tensor, module: str, precision: Precision) -> Any:
    made = tensor.detach().cpu().to(DTYPES[precision])
    if not torch.isfinite(made).all():
        largest = tensor.abs().max().item()
        raise AdapterError(
            f"the adapter at {module} holds numbers that {precision} cannot hold (up to {largest:.3g})",
            f"numbers up to {LARGEST:.3g}" if precision == "f16" else "finite numbers",
            "--precision f32"
            if precision == "f16" and torch.isfinite(tensor).all()
            else "an older checkpoint of the run",
        )
    return made.contiguous().numpy()
