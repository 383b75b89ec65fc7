"""Compute and write the weights of base and adapters merged, one file of the checkpoint at a time.

No second model is ever in memory: transformers maps the base's weights from their files, one module's update is
computed when its tensors are written, and a file's changed tensors are released when the file is complete.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ..core.adapters.adapted_layer import ADDED_CHILDREN
from ..core.adapters.merging import mark_embeddings_untied, merge_adapters_into_layer, unmerge_adapters_from_layer
from ..core.adapters.quantized_layers import find_cpu_repacking_layers, keep_differentiable_4bit_layout
from ..core.foundation.dtype_names import dtype_name
from ..core.foundation.progress_bars import track_progress
from ..core.kernels.linear_layers import (
    dequantizes_itself,
    get_base_layer_type,
    get_dequantized_weight,
    get_in_and_out_features,
    is_quantized,
    is_weight_transposed,
)
from ..errors import AdapterError
from .gptq_rounding import MIN_TOKENS, round_with_inputs

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 250_000_000, 5_000_000_000


class LazyMergedStateDict(Mapping[str, Tensor]):
    """The state dict of an adapted model, merged; computed on access, and the model's own weights stay as they are.

    Unchanged tensors are the base's own, dequantized if it is quantized. Changed ones are in float32 at least, not
    rounded yet. Of tied tensors only the name that transformers stores is included. If merging gives tied embeddings
    and head different values, the model's config is changed to say that they are not tied.

    Without `adapters` the active ones are merged; an empty list gives the base. MergeUnsupported means that a method
    cannot be merged, or a result is NaN or Inf; it often comes only when a tensor is computed.
    """

    def __init__(self, model: Any, adapters: Sequence[str] | None = None) -> None:
        self.model = model
        self._adapters = list(model.active_adapters if adapters is None else adapters)
        self._layers = {n: m for a in self._adapters for n, m in model.adapted_layers(a).items()}
        self._cache: tuple[str, dict[str, Tensor]] | None = None
        keep_differentiable_4bit_layout(
            find_cpu_repacking_layers(model)
        )  # `state_dict` would restore that layout wrongly
        self._quantized = {
            n: m for n, m in model.named_modules() if get_base_layer_type(m) == "linear" and is_quantized(m)
        }
        own = {f"{n}.{leaf}" for n in self._quantized for leaf in ("weight", "bias")}
        added = [f"{n}.{t}.".lstrip(".") for n in model.adapted_layers() for t in ADDED_CHILDREN]
        added += [f"{n}." for n in self._quantized]  # what dequantizes a weight: `q_proj.weight.absmax`, `q_proj.SCB`
        state = model.state_dict(keep_vars=True)
        self._base: dict[str, Tensor] = {n: t for n, t in state.items() if n in own or not n.startswith(tuple(added))}
        for name, module in self._layers.items():
            if not module._parameters:  # nothing will ask for its tensors, and it may be a method without a merge
                self._merge(name)
        uses = Counter(map(id, self._base.values()))
        tied = [name.rpartition(".") for name, tensor in self._base.items() if uses[id(tensor)] > 1]
        if any(leaf in self._merge(module) for module, _, leaf in tied):
            mark_embeddings_untied(model)
        for name, stored_name in getattr(model, "all_tied_weights_keys", {}).items():
            if name in self._base and self._base[name] is self._base.get(stored_name):
                del self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        merged = self._merge(module)
        if leaf in merged:
            return merged[leaf].detach()
        if leaf == "weight" and module in self._quantized:
            return get_dequantized_weight(self._quantized[module]).detach()
        return _dequantize_if_experts(self._base[name]).detach()

    def outline(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor on `meta` with the shape and dtype it is stored with: parameters in `dtype`."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._quantized:
            return torch.empty(get_in_and_out_features(self._quantized[module])[::-1], dtype=dtype, device="meta")
        tensor = self._base[name]
        cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype, device="meta")

    def count(self) -> int:
        """Return the number of values in all tensors."""
        return sum(self.outline(name, torch.float32).numel() for name in self)

    def _merge(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of a module that the adapters change, merged, by their names in it."""
        if name not in self._layers:
            return {}
        if self._cache is None or self._cache[0] != name:
            self._cache = None  # released before the next one is computed
            self._cache = (name, _merge_layer(name, self._layers[name], self._adapters))
        return self._cache[1]


def _dequantize_if_experts(parameter: Any) -> Tensor:
    """Return a parameter, or the values of stacked experts that are quantized."""
    return parameter.dequantized() if dequantizes_itself(parameter) else parameter


def _merge_layer(name: str, module: Any, adapters: list[str]) -> dict[str, Tensor]:
    """Return the parameters that merging changes, in float32 at least; the module stays as it is.

    `merge_adapters_into_layer` rounds to the dtype of the module's parameters; wide copies stand in for them meanwhile.
    """
    own = dict(module._parameters)
    wide: dict[str, nn.Parameter | None] = {}
    try:
        for leaf, parameter in own.items():
            if parameter is not None:
                is_layer = leaf == "weight" and get_base_layer_type(module) == "linear"
                values = get_dequantized_weight(module) if is_layer and is_quantized(module) else parameter
                values = _dequantize_if_experts(values)
                values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
                wide[leaf] = module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        merge_adapters_into_layer(name or type(module).__name__, module, adapters, require_finite=True)
        replaced = module.original_parameters
        buffers = {n: b.detach().clone() for n, b in module._buffers.items() if n in replaced}
        return {n: p.detach() for n, p in module._parameters.items() if p is not None and p is not wide[n]} | buffers
    finally:
        unmerge_adapters_from_layer(module)
        module._parameters.update(own)


def save_merged_weights(
    weights: LazyMergedStateDict,
    folder: Path,
    dtype: torch.dtype,
    calibration_inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model.safetensors`, or several files and their index, as transformers names them.

    A file has a twentieth of all bytes, 0.25 to 5 GB, unless one layer is larger.

    Args:
        weights: what to write.
        folder: it exists.
        dtype: that parameters are stored in, AdapterError if it cannot hold a value; buffers keep theirs.
        calibration_inputs: of linear layers, by name, to round with (see `gptq_rounding.py`); other weights are rounded
            to nearest.
    """
    model, ignored = weights.model, set(getattr(weights.model, "_keys_to_ignore_on_save", None) or ())
    outline = {n: weights.outline(n, dtype) for n in weights if n not in ignored}
    total_bytes = sum(t.nbytes for t in outline.values())
    shard_bytes, used = min(max(total_bytes // 20, MIN_SHARD_BYTES), MAX_SHARD_BYTES), 0
    plan: list[list[list[str]]] = [[]]  # for each file the groups of names that are converted together
    for group in _group_names(model, outline):
        size = sum(outline[name].nbytes for name in group)
        if plan[-1] and used + size > shard_bytes:
            plan.append([])
            used = 0
        plan[-1].append(group)
        used += size
    files: dict[str, str] = {}
    for number, groups in enumerate(plan, 1):
        file = "model.safetensors" if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for names in track_progress(groups, f"weights of {file}"):
            # No variable for these: it would keep one layer in memory while the next file is computed.
            tensors |= revert_weight_conversion(
                model,
                {
                    n: round_merged_weight(model, n, weights[n], outline[n].dtype, calibration_inputs or {})
                    for n in names
                },
            )
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(plan) > 1:
        metadata = {"total_parameters": sum(t.numel() for t in outline.values()), "total_size": total_bytes}
        index = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True, allow_nan=False)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _group_names(model: Any, outline: dict[str, Tensor]) -> list[list[str]]:
    """Group names by layer, because transformers converts some tensors of a layer together (stacked experts).

    If that gives other tensors than converting all together, as `save_pretrained` does, there is one group.
    """
    groups: dict[str, list[str]] = {}
    for name in outline:
        layer_prefix = re.match(r".*?\.\d+\.", name)
        groups.setdefault(layer_prefix[0] if layer_prefix else name, []).append(name)

    def convert(names: Sequence[str]) -> dict[str, torch.Size]:
        return {n: t.shape for n, t in revert_weight_conversion(model, {n: outline[n] for n in names}).items()}

    by_layer: dict[str, torch.Size] = {}
    for names in groups.values():
        by_layer |= convert(names)
    return list(groups.values()) if by_layer == convert(list(outline)) else [list(outline)]


def round_merged_weight(
    model: Any, name: str, weight: Tensor, dtype: torch.dtype, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Round a parameter to `dtype`, with the inputs of its layer if they are known; AdapterError if it is too large."""
    nearest, (module, _, leaf) = weight.to(dtype), name.rpartition(".")
    if weight.dtype != dtype and dtype.is_floating_point and not torch.isfinite(nearest).all():
        raise AdapterError(
            f"{name} contains values that {dtype_name(dtype)} cannot hold",
            f"values up to {torch.finfo(dtype).max:.3g}",
            "--dtype bfloat16 or float32",
        )
    x = inputs.get(module)
    if leaf != "weight" or x is None or len(x) < MIN_TOKENS or torch.equal(nearest, weight):
        return nearest
    if is_weight_transposed(model.get_submodule(module)):
        return round_with_inputs(weight.t(), x, dtype).t()
    return round_with_inputs(weight, x, dtype)


class CheckpointTensors:
    """The tensors of a Hugging Face folder, loaded one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}  # by the tensor's name
        for file in folder.glob("*.safetensors"):
            with safe_open(str(file), "pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def load(self, name: str) -> Tensor:
        """Return one tensor, as it is stored."""
        with safe_open(str(self.files[name]), "pt") as opened:
            return opened.get_tensor(name)
