"""The weights a merge would leave, one module at a time, so that no second model is ever held.

MergedState(model)["model.layers.3.self_attn.q_proj.weight"]   W + ΔW, in fp32 at least: the caller rounds once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.linear_layers import get_weight, is_quantized, layer_kind, layer_sizes
from . import layer
from .model import _untie
from .quantized import disable_cpu_repacking, find_repacking_layers


class MergedState(Mapping[str, Tensor]):
    """What the state dict of the merged model holds, computed when it is asked for; no weight of the model is written.

    What adapters do not change is the base's own tensor, dequantized where it is kept in fewer bits. What they change
    is computed with its module, and kept until a tensor of another module is asked for. Names of one tied tensor are
    one, that by which transformers stores it; a merge that makes it two is said in the model's config, as
    `merge_and_unload` does.

    Args:
        model: an adapted model, not merged.
        adapters: which to merge; None: the active ones; none of them: what comes out is the base.

    Raises:
        MergeRefused: a method cannot be merged, or what comes out is not finite. At once where the first module of
            each kind shows it, else when the tensor is asked for.
    """

    def __init__(self, model: Any, adapters: Sequence[str] | None = None) -> None:
        at = model._attached
        self._adapters = list(at.active if adapters is None else adapters)
        self._modules: dict[str, layer.AdaptedLayer] = {n: m for a in self._adapters for n, m in at.members[a]}
        self._last: tuple[str, dict[str, Tensor]] | None = None
        # What bitsandbytes laid out anew, its `state_dict` puts back wrongly.
        disable_cpu_repacking(find_repacking_layers(model))
        inside = tuple(f"{n}.{table}.".lstrip(".") for n in at.modules() for table in ("adapters", "trained_copies"))
        self._base: dict[str, Tensor] = {
            n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(inside)
        }
        self._packed = {n: m for n, m in model.named_modules() if layer_kind(m) == "linear" and is_quantized(m)}
        for name in [n for n in self._base if self._is_state_of_packed(n)]:
            del self._base[name]
        self._refuse()
        if self._parts_tied():
            _untie(model)
        for name, kept in getattr(model, "all_tied_weights_keys", {}).items():
            if name in self._base and self._base[name] is self._base.get(kept):
                del self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        module, _, leaf = name.rpartition(".")
        if module in self._modules and leaf in self._changed(module):
            return self._changed(module)[leaf].detach()
        return (get_weight(self._packed[module]) if leaf == "weight" and module in self._packed else base).detach()

    def like(self, name: str) -> Tensor:
        """Return a tensor of the shape, and a parameter or a buffer, as the merged one is; its values are not meant."""
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._packed:
            return nn.Parameter(
                torch.empty(layer_sizes(self._packed[module])[::-1], device="meta"), requires_grad=False
            )
        return self._base[name]

    def _is_state_of_packed(self, name: str) -> bool:
        """Return whether a name is of what dequantizes a weight: `q_proj.weight.absmax`, `q_proj.SCB`."""
        parts = name.split(".")
        owner = next((i for i in range(len(parts)) if ".".join(parts[:i]) in self._packed), None)
        return owner is not None and parts[owner:] not in (["weight"], ["bias"])

    def _changed(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of a module that the adapters change, as they are after, by their names in it."""
        if self._last is None or self._last[0] != name:
            self._last = None  # let go before the next one is made
            self._last = (name, _folded(name, self._modules[name], self._adapters))
        return self._last[1]

    def _refuse(self) -> None:
        """Merge one module of each kind, and all that have no weight: no tensor of theirs will be asked for."""
        seen = set()
        for name, module in self._modules.items():
            kind = (type(module), *(type(module.adapters[a]) for a in self._adapters if a in module.adapters))
            if kind not in seen or not module._parameters:
                seen.add(kind)
                self._changed(name)

    def _parts_tied(self) -> bool:
        """Return whether the adapters change a tensor that has several names."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._base.items():
            names.setdefault(id(tensor), []).append(name)
        tied = [name.rpartition(".") for group in names.values() if len(group) > 1 for name in group]
        return any(leaf in self._changed(module) for module, _, leaf in tied if module in self._modules)


def _folded(name: str, module: layer.AdaptedLayer, adapters: list[str]) -> dict[str, Tensor]:
    """Return what merging makes of a module's parameters, not rounded to the base's dtype; the module stays."""
    own = dict(module._parameters)
    try:
        for n, p in own.items():
            if p is not None:
                values = get_weight(module) if n == "weight" and is_quantized(module) else p
                wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
                module._parameters[n] = nn.Parameter(wide, requires_grad=False)
        layer.merge(name or type(module).__name__, module, adapters, check=True)
        return {n: module._parameters[n].detach() for n in module._kept or ()}  # type: ignore[union-attr]
    finally:
        layer.unmerge(module)
        module._parameters.update(own)
