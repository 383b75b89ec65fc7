"""Trainable tokens's adapter modules."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward, SiteKind
from ...core.adapters.targets import matches_regex_or_names
from ...core.kernels.linear_layers import get_base_layer_type, get_dequantized_weight
from ...errors import TargetError, suggest


class TrainableRowsSpec(NamedTuple):
    """The trained rows of one embedding or linear layer."""

    kind: SiteKind
    token_indices: list[int]
    tied_to: str | None
    """Name of the module it is tied to, whose rows it shares; None: it has its own."""


def find_or_guess_input_embedding_name(model: Any) -> str:
    """Return the full name of the model's input embedding; PEFT's guess for models without get_input_embeddings."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((n for n, m in model.named_modules() if m is embedding), "embed_tokens")


def map_trainable_row_specs_by_module(
    model: nn.Module, tokens: list[int] | Mapping[str, list[int]], modules_to_save: Collection[str]
) -> dict[str, TrainableRowsSpec]:
    """Return the modules whose rows train, by full name; owners come before the modules tied to them.

    `tokens` are ids of tokens in the input embedding, or such lists by the name, or ending, of an embedding.
    """
    if not isinstance(tokens, Mapping):
        tokens = {find_or_guess_input_embedding_name(model): tokens}
    modules: dict[str, Any] = {
        n: m for n, m in model.named_modules() if get_base_layer_type(m) in ("embedding", "linear")
    }
    chosen: dict[str, list[int]] = {}
    for key, ids in tokens.items():
        names = [n for n in modules if matches_regex_or_names([key], n)]
        if not names:
            message = f"trainable_token_indices: {key!r} matches no embedding{suggest(key, modules)}"
            raise TargetError(message, "the name of an embedding", "for the input embedding give a plain list of ids")
        chosen |= dict.fromkeys(names, ids)
    owners: dict[int, str] = {}
    for name in sorted(chosen, key=lambda n: get_base_layer_type(modules[n]) != "embedding"):
        if name.endswith(tuple(modules_to_save)):
            message = f"{name} is in modules_to_save and also has trainable tokens"
            raise TargetError(message, "one of the two")
        size = get_dequantized_weight(modules[name]).shape[
            1 if get_base_layer_type(modules[name]) == "embedding" else 0
        ]
        if max(chosen[name]) >= size:
            raise TargetError(f"trainable tokens: {name} has no row {max(chosen[name])}", f"ids below {size}")
        owners.setdefault(id(modules[name]._parameters["weight"]), name)
    own, shared = {}, {}
    for name, module in modules.items():
        kind: Any = get_base_layer_type(module)
        owner = owners.get(id(module._parameters["weight"]))
        if owner is not None and owner != name and chosen.get(name, chosen[owner]) == chosen[owner]:
            shared[name] = TrainableRowsSpec(kind, chosen[owner], owner)
        elif name in chosen:
            own[name] = TrainableRowsSpec(kind, chosen[name], None)
    return own | shared


def build_trainable_row_modules(
    sites: Sequence[AdapterSite],
    row_specs_by_name: Mapping[str, TrainableRowsSpec],
    save_shared: bool = False,
    start_as_base: bool = True,
) -> dict[str, AdapterModule]:
    """Return the adapter modules of these sites by name; tied ones share their rows.

    `save_shared`: files store shared rows under each module's name; PEFT's trainable tokens do, its LoRA does not.
    """
    built: dict[str, AdapterModule] = {}
    for site in sorted(sites, key=lambda s: row_specs_by_name[s.name].tied_to is not None):
        cls, owner = (
            TrainableTokenEmbedding if site.kind == "embedding" else TrainableTokenLinear,
            row_specs_by_name[site.name].tied_to,
        )
        held = () if owner is None else (built[owner],)
        built[site.name] = cls(site, row_specs_by_name[site.name].token_indices, held, save_shared, start_as_base)
    return built


class _TokenRows(AdapterModule):
    """Has the rows `V (k, d)` and their ids, unless it shares those of another module, its owner."""

    peft_values: ClassVar = {"token_indices": "token_indices", "trainable_tokens_delta": "rows"}

    def __init__(
        self, site: AdapterSite, token_ids: list[int], held: tuple, save_shared: bool, start_as_base: bool
    ) -> None:
        super().__init__()
        # The owner is in a tuple, so that its parameter is not registered here too.
        self.shared, self.save_shared, self.token_indices = held, save_shared, token_ids
        if held:
            self.optional = frozenset({"trainable_tokens_delta"})  # type: ignore[misc]
            return
        weight = get_dequantized_weight(site.module).detach()
        weight = weight.t() if site.kind == "embedding" else weight
        ids = torch.tensor(token_ids, device=site.device)
        if start_as_base:
            values = weight[ids].to(site.dtype)
        else:
            values = torch.randn(len(ids), weight.shape[1], dtype=weight.dtype, device=site.init_device)
        # Beside a LoRA, the parameter has PEFT's longer name.
        holder = self if save_shared else nn.Module()
        holder.trainable_tokens_delta = nn.Parameter(values.to(site.device, site.dtype, copy=True))
        if holder is not self:
            self.token_adapter = holder
        sorted_ids, order = ids.sort()
        for name, tensor in (("ids", ids), ("order", order), ("sorted_ids", sorted_ids)):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def owner(self) -> Any:
        """The module that has the rows."""
        return self.shared[0] if self.shared else self

    @property
    def rows(self) -> nn.Parameter:
        """V `(k, d)`, in the order of the ids."""
        return self._holder.trainable_tokens_delta  # type: ignore[return-value]

    @rows.setter
    def rows(self, values: nn.Parameter) -> None:
        self._holder.trainable_tokens_delta = values

    @property
    def _holder(self) -> nn.Module:
        return self.owner._modules.get("token_adapter", self.owner)

    def replaced_rows(self) -> frozenset[int]:
        return frozenset(self.token_indices)

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor]:
        weight, ids = site.weight(), self.owner.ids
        rows = weight.t()[ids] if site.kind == "embedding" else weight[ids]
        return {n: rows for n, _ in self.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """Return V; where it is shared nothing, or a copy if files store it twice (loading ignores the copy)."""
        if not self.shared:
            return super().tensors()
        return {"trainable_tokens_delta": self.rows.detach().clone()} if self.save_shared else {}


class TrainableTokenEmbedding(_TokenRows):
    """Trained rows of an embedding: maps token ids `x (...)` and the frozen rows `y (..., d)` to `(..., d)`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        owner = self.owner
        index = torch.searchsorted(owner.sorted_ids, x).clamp(max=len(owner.sorted_ids) - 1)
        trained = F.embedding(owner.order[index], self.rows).to(y.dtype)
        return torch.where((owner.sorted_ids[index] == x)[..., None], trained, y)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(1, self.owner.ids, self.rows.to(weight.dtype).t()), bias


class TrainableTokenLinear(_TokenRows):
    """Trained rows of a linear layer: maps `x (..., d)` to logits `(..., rows)`."""

    def forward_with_base(self, base: BaseForward, x: Tensor) -> Tensor:
        V, ids = self.rows, self.owner.ids
        change = V - base.weight().detach()[ids].to(V.dtype)
        return base(x).index_add(-1, ids, F.linear(x, change.to(x.dtype)))

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.owner.ids, self.rows.to(weight.dtype)), bias
