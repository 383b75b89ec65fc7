"""Write the weights of base and adapters merged, one shard of the checkpoint at a time.

No second model is ever in memory: transformers maps the base's weights from their files, one module's update is
computed when its tensors are written, and a shard's changed tensors are released when its file is complete.

Most tensors have the same name in the model and in the checkpoint. Where transformers holds them differently (experts
stacked, fused layers split), the tensors that become one, or come from one, are converted together, as
`save_pretrained` does: layer by layer unless layers mix.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ..adapters import layer
from ..adapters.model import mark_embeddings_untied
from ..adapters.quantized import disable_cpu_repacking, find_repacking_layers
from ..errors import AdapterError
from ..utils.linear_layers import get_weight, is_quantized, is_transposed, layer_kind, layer_sizes
from .rounding import MIN_INPUTS, round_with_inputs

MIN_SHARD_BYTES, MAX_SHARD_BYTES = 250_000_000, 5_000_000_000


class MergedWeights(Mapping[str, Tensor]):
    """The state dict of the merged model, computed on access; the model's own weights stay as they are.

    Unchanged tensors are the base's own, dequantized if it is quantized. Changed ones are in float32 at least, not
    rounded yet; those of one module are kept until another module's are computed. Of tied tensors only the name
    that transformers stores is included. If merging gives tied embeddings and head different values, the model's config
    is changed to say that they are not tied, as `merge_and_unload` does.

    Args:
        model: an adapted model, not merged.
        adapters: which to merge; None: the active ones; empty: the result is the base.

    Raises:
        MergeUnsupported: a method cannot be merged, or a result is NaN or Inf: at once if the first module of a kind
            shows it, otherwise when the tensor is computed.
    """

    def __init__(self, model: Any, adapters: Sequence[str] | None = None) -> None:
        self._adapters = list(model.active_adapters if adapters is None else adapters)
        self._layers = {n: m for a in self._adapters for n, m in model.adapted_layers(a).items()}
        self._cache: tuple[str, dict[str, Tensor]] | None = None
        disable_cpu_repacking(find_repacking_layers(model))  # `state_dict` would restore that layout wrongly
        inside = tuple(f"{n}.{t}.".lstrip(".") for n in model.adapted_layers() for t in ("adapters", "trained_copies"))
        self._quantized = {n: m for n, m in model.named_modules() if layer_kind(m) == "linear" and is_quantized(m)}
        self._base: dict[str, Tensor] = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not name.startswith(inside) and not self._is_quantization_state(name)
        }
        kinds = set()
        for name, module in self._layers.items():
            kind = (type(module), *(type(module.adapters[a]) for a in self._adapters if a in module.adapters))
            if kind not in kinds or not module._parameters:  # a module without parameters is never asked for
                kinds.add(kind)
                self._compute(name)
        if self._unties_a_tensor():
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
        if module in self._layers and leaf in self._compute(module):
            return self._compute(module)[leaf].detach()
        is_packed = leaf == "weight" and module in self._quantized
        return (get_weight(self._quantized[module]) if is_packed else self._base[name]).detach()

    def outline(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor on `meta` with the shape and dtype it is stored with: parameters in `dtype`."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._quantized:
            return torch.empty(layer_sizes(self._quantized[module])[::-1], dtype=dtype, device="meta")
        tensor = self._base[name]
        cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=dtype if cast else tensor.dtype, device="meta")

    def _is_quantization_state(self, name: str) -> bool:
        """Return whether a name belongs to what dequantizes a weight: `q_proj.weight.absmax`, `q_proj.SCB`."""
        parts = name.split(".")
        owner = next((i for i in range(len(parts)) if ".".join(parts[:i]) in self._quantized), None)
        return owner is not None and parts[owner:] not in (["weight"], ["bias"])

    def _compute(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of a module that the adapters change, merged, by their names in it."""
        if self._cache is None or self._cache[0] != name:
            self._cache = None  # released before the next one is computed
            self._cache = (name, _merge_layer(name, self._layers[name], self._adapters))
        return self._cache[1]

    def _unties_a_tensor(self) -> bool:
        """Return whether the adapters change a tensor that has several names."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._base.items():
            names.setdefault(id(tensor), []).append(name)
        tied = [name.rpartition(".") for group in names.values() if len(group) > 1 for name in group]
        return any(leaf in self._compute(module) for module, _, leaf in tied if module in self._layers)


def _merge_layer(name: str, module: Any, adapters: list[str]) -> dict[str, Tensor]:
    """Return the parameters that merging changes, in float32 at least; the module stays as it is.

    `layer.merge` rounds to the dtype of the module's parameters, so wide copies stand in for them meanwhile.
    """
    own = dict(module._parameters)
    wide: dict[str, nn.Parameter | None] = {}
    try:
        for leaf, parameter in own.items():
            if parameter is not None:
                values = get_weight(module) if leaf == "weight" and is_quantized(module) else parameter
                values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
                wide[leaf] = module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        layer.merge_adapters(name or type(module).__name__, module, adapters, check=True)
        return {n: p.detach() for n, p in module._parameters.items() if p is not None and p is not wide[n]}
    finally:
        layer.unmerge_adapters(module)
        module._parameters.update(own)


class MergedCheckpoint:
    """The weight files of base and adapters merged; nothing is computed before `save`.

    Args:
        model: an adapted model.
        dtype: that parameters are stored in; buffers keep theirs.
        adapters: as for `MergedWeights`.
        inputs: of linear layers, by name, to round with (see `rounding.py`); other weights are rounded to nearest.

    Raises:
        MergeUnsupported: as for `MergedWeights`.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        adapters: Sequence[str] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._weights, self._inputs = model, MergedWeights(model, adapters), inputs or {}
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        outline = {n: self._weights.outline(n, dtype) for n in self._weights if n not in ignored}
        self._stored: dict[str, Tensor] = revert_weight_conversion(model, dict(outline))
        """Tensors of the files, on `meta`, by their names there."""
        self.parameters = sum(t.numel() for t in self._stored.values())
        self.bytes = sum(t.nbytes for t in self._stored.values())
        # A tensor that is only renamed comes out as the object that went in.
        names = {id(t): n for n, t in outline.items()}
        renamed = {key: names[id(t)] for key, t in self._stored.items() if id(t) in names}
        groups: list[tuple[list[str], list[str]]] = [([name], [key]) for key, name in renamed.items()]
        converted = {n: t for n, t in outline.items() if n not in set(renamed.values())}
        order = {key: i for i, key in enumerate(self._stored)}
        self._groups = sorted([*groups, *self._group_converted(converted)], key=lambda g: order[g[1][0]])
        """Names in the model and names in the files of tensors that are converted together, in the files' order."""

    def _group_converted(self, outline: dict[str, Tensor]) -> list[tuple[list[str], list[str]]]:
        """Group tensors that transformers converts: by layer if that gives the same result as all together."""
        if not outline:
            return []
        layers: dict[str, list[str]] = {}
        for name in outline:
            prefix = re.match(r".*?\.\d+\.", name)
            layers.setdefault(prefix[0] if prefix else "", []).append(name)
        groups: list[tuple[list[str], list[str]]] = []
        shapes: dict[str, torch.Size] = {}
        for names in layers.values():
            result = revert_weight_conversion(self._model, {n: outline[n] for n in names})
            shapes |= {key: t.shape for key, t in result.items()}
            groups.append((names, list(result)))
        together = revert_weight_conversion(self._model, dict(outline))
        if shapes == {key: t.shape for key, t in together.items()}:
            return groups
        return [(list(outline), list(together))]

    def save(self, folder: Path) -> None:
        """Write `model.safetensors`, or several files and their index, as transformers names them.

        A file has a twentieth of all bytes, 0.25 to 5 GB, unless one group of tensors is larger; its changed tensors
        are in memory while it is written.

        Args:
            folder: it exists.

        Raises:
            MergeUnsupported: a result is NaN or Inf.
            AdapterError: the dtype cannot hold a value.
        """
        shards: list[list[tuple[list[str], list[str]]]] = [[]]
        shard_bytes, used = min(max(self.bytes // 20, MIN_SHARD_BYTES), MAX_SHARD_BYTES), 0
        for group in self._groups:
            size = sum(self._stored[key].nbytes for key in group[1])
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(group)
            used += size
        files: dict[str, str] = {}
        for number, groups in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for names, keys in groups:
                tensors |= self._compute(names, keys)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            metadata = {"total_parameters": self.parameters, "total_size": self.bytes}
            index = json.dumps({"metadata": metadata, "weight_map": files}, indent=2, sort_keys=True)
            (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")

    def _compute(self, names: list[str], keys: list[str]) -> dict[str, Tensor]:
        """Return the tensors of one group, rounded as they are stored."""
        if len(names) == len(keys) == 1:
            tensors = {keys[0]: self._round_with_inputs(names[0], self._weights[names[0]], self._stored[keys[0]].dtype)}
        else:
            tensors = revert_weight_conversion(self._model, {n: self._weights[n] for n in names})
        for key, tensor in tensors.items():
            dtype = self._stored[key].dtype
            stored = tensor.detach().to(dtype).contiguous()
            if tensor.dtype != dtype and dtype.is_floating_point and not torch.isfinite(stored).all():
                raise AdapterError(
                    f"{key} contains values that {str(dtype).removeprefix('torch.')} cannot hold",
                    f"values up to {torch.finfo(dtype).max:.3g}",
                    "--dtype bfloat16 or float32",
                )
            tensors[key] = stored
        return tensors

    def _round_with_inputs(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        module, _, leaf = name.rpartition(".")
        inputs, nearest = self._inputs.get(module), weight.to(dtype)
        needless = torch.equal(nearest, weight) or not torch.isfinite(nearest).all()
        if leaf != "weight" or inputs is None or len(inputs) < MIN_INPUTS or needless:
            return weight
        transposed = is_transposed(self._model.get_submodule(module))
        rounded = round_with_inputs(weight.t() if transposed else weight, inputs, dtype)
        return rounded.t() if transposed else rounded
