"""Which adapters run: one selection for the whole batch, or a different adapter for each row of a mixed batch.

The adapted layers of a model read it from one `ActiveAdapters`; `mixed_batch.py` sets it for a call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ..kernels.lora_linear import list_equal_group_adapters, stack_mixed_batch_lora

BASE_ROW = "__base__"
"""PEFT's name for a row of a mixed batch that runs the base without an adapter."""


ADAPTED_ATTRIBUTES = ("active_state", "original_parameters", "merged_names", "current_copy")
"""What an adapted module has in addition to its base's attributes."""
ADDED_CHILDREN = ("adapters", "modules_to_save")
"""Its children, by adapter: adapter modules, and trained copies of the base's parameters."""
_NO_COPIES = nn.ModuleDict()
"""The trained copies of a layer without any; nothing is added to it."""


class ChangedTokens(NamedTuple):
    """The tokens of a call that one adapter changes."""

    batch: int
    length: int
    indices: Tensor
    """The changed tokens, counted over all rows."""
    kept: Tensor | None
    """The only columns that the output head gets (`logits_to_keep`); None: all."""

    def find_indices(self, x: Tensor, layer: str) -> Tensor:
        """Return the indices among the tokens of a layer's input `x`, `(batch, T, in)` or `(batch · T, in)`."""
        indices, shape = self.indices.to(x.device), tuple(x.shape[:-1])
        if shape in ((self.batch, self.length), (self.batch * self.length,)):
            return indices
        if self.kept is not None and shape == (self.batch, len(self.kept)):
            changed = torch.zeros(self.batch * self.length, dtype=torch.bool, device=x.device)
            changed[indices] = True
            return changed.view(self.batch, -1)[:, self.kept.to(x.device)].reshape(-1).nonzero()[:, 0]
        message = f"{layer} gets an input of shape {tuple(x.shape)} in a call of {self.batch} × {self.length} tokens"
        name = layer.rpartition(".")[2]
        hint = f"leave it out of the activated LoRA: exclude_modules=[{name!r}]"
        raise UsageError(message, "a layer that gets every token of the call", hint)


class StackedFactors(NamedTuple):
    """The low-rank factors of one layer's rows, stacked, and what they were built from."""

    call: tuple
    """Number of the last call that used them, its batch size and dtype."""
    factors: tuple[Tensor, Tensor]
    """`A (groups, r, in)` and `B (groups, out, r)`, scale included."""
    key: tuple
    """Identifies the row groups and the state of the source tensors; equal keys mean equal stacks."""
    sources: list[Tensor]
    """The source tensors, kept alive so that their `id` in `key` is not reused."""


@dataclass
class ActiveAdapters:
    """The adapters that run now; all adapted layers of a model share one object."""

    active: list[str] = field(default_factory=list)
    """The adapters that were chosen, in the order in which they are applied."""
    merged: list[str] = field(default_factory=list)
    """The adapters that are merged into the base: these run in place of the active ones."""
    enabled: bool = True
    """False: the base runs alone."""
    layers_with_own: list[Any] = field(default_factory=list)
    """Layers whose active adapters differ: see `LayerAdapters`."""
    row_adapters: tuple[str, ...] | None = None
    """During a mixed batch: each row's adapter, `BASE_ROW` for none."""
    call_id: int = 0
    """Number of the current mixed call."""
    packed_runs: Any = None
    """During a packed call for several models: the `PackedRuns` with the adapter of each span of tokens."""
    changed_tokens: Mapping[str, ChangedTokens] | None = None
    """During a call with activated LoRAs: the tokens that each one changes."""
    invocation_starts: Mapping[str, Tensor] | None = None
    """While generating with activated LoRAs: the first position that each one changes, by row of the prompt."""
    _masks: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)
    _stacks: dict[nn.Module, StackedFactors] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The adapters that run, in the order in which they are applied."""
        return (self.merged or self.active) if self.enabled else []

    def __getstate__(self) -> dict[str, Any]:
        # Copying one layer must not copy the others through the cache.
        return {**vars(self), "_masks": {}, "_stacks": {}}

    def _expand_row_adapters(self, batch: int) -> list[str]:
        """Return each row's adapter in a batch; beam search repeats every row."""
        names = self.row_adapters
        assert names is not None
        if not names or batch % len(names):
            raise wrong_row_count(names, batch)
        return [n for n in names for _ in range(batch // len(names))]

    def get_row_masks(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return for each adapter of a mixed batch which rows use it, as a bool `(batch,)`."""
        key = (self.row_adapters, batch, device)
        if key not in self._masks:
            rows = self._expand_row_adapters(batch)
            self._masks.clear()
            with torch.inference_mode(False):  # later calls may need gradients
                names = [n for n in dict.fromkeys(rows) if n != BASE_ROW]
                self._masks[key] = {n: torch.tensor([row == n for row in rows], device=device) for n in names}
        return self._masks[key]

    def get_token_indices(self, adapter: str, x: Tensor, layer: str) -> Tensor:
        """Return the indices of the tokens that an activated LoRA changes in a layer's input `x (batch, T, in)`.

        They count the tokens of all rows; `x` may also be `(batch · T, in)`.
        """
        if self.changed_tokens is None:
            message = f"{layer} runs outside a call of the model: the tokens that an activated LoRA changes are unknown"
            raise UsageError(message, hint="call the adapted model itself, with input_ids")
        return self.changed_tokens[adapter].find_indices(x, layer)

    def get_cached_factors(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors stacked for a layer earlier in this call (generation runs it often), or None."""
        if torch.is_grad_enabled() or (stack := self._stacks.get(layer)) is None:
            return None
        return stack.factors if stack.call == (self.call_id, x.shape[0], x.dtype) else None

    def stack_row_factors(self, layer: nn.Module, x: Tensor, factors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the stacked factors for the rows of a layer's input `x (batch, ..., in)`.

        `factors` are `(A, B, scale)` by adapter name. Without gradients, an earlier stack is reused if nothing changed.
        """
        groups = list_equal_group_adapters(self._expand_row_adapters(x.shape[0]))
        if torch.is_grad_enabled():
            return stack_mixed_batch_lora([factors.get(n) for n in groups], x)
        sources = [t for A, B, _ in factors.values() for t in (A, B)]
        # Fused optimizers do not raise a tensor's version counter: factors that train are stacked for every call.
        frozen = not any(t.requires_grad or t.is_inference() for t in sources)
        versions = [(id(t), t._version, t.data_ptr()) for t in sources] if frozen else [self.call_id]
        key = (groups, x.dtype, list(factors), [s for _, _, s in factors.values()], versions)
        stack = self._stacks.get(layer)
        stacked = (
            stack.factors if stack and stack.key == key else stack_mixed_batch_lora([factors.get(n) for n in groups], x)
        )
        self._stacks[layer] = StackedFactors((self.call_id, x.shape[0], x.dtype), stacked, key, sources)
        return stacked

    def clear_stacked_factors(self) -> None:
        """Drop stacked factors; call it after adapters were added, removed or moved."""
        self._stacks.clear()


class CheckpointSelection:
    """Activation checkpointing that recomputes a layer with the rows' adapters and tokens of its forward pass."""

    def __init__(self, checkpoint: Callable[..., Any], active: ActiveAdapters) -> None:
        self.checkpoint, self.active = checkpoint, active

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = self.active
        selection = {n: getattr(active, n) for n in ("row_adapters", "changed_tokens")}

        def run_with_selection(*args: Any, **kwargs: Any) -> Any:
            before = {n: getattr(active, n) for n in selection}
            vars(active).update(selection)
            try:
                return run(*args, **kwargs)
            finally:
                vars(active).update(before)

        return self.checkpoint(run_with_selection, *args, **kwargs)


class LayerAdapters:
    """The active adapters of one layer that differ from the model's, after `layer.set_adapter` or `enable_adapters`."""

    def __init__(self, model_state: ActiveAdapters, active: list[str], enabled: bool) -> None:
        self.model_state, self.active, self.enabled = model_state, active, enabled

    @property
    def names(self) -> list[str]:
        """The adapters that run on this layer."""
        return (self.model_state.merged or self.active) if self.enabled and self.model_state.enabled else []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model_state" not in vars(self):
            raise AttributeError(name)
        return getattr(self.model_state, name)


class AdaptedModule(nn.Module):
    """What an adapted module has besides what its base has; see `layer.py`."""

    adapters: nn.ModuleDict
    active_state: ActiveAdapters
    original_parameters: dict[str, nn.Parameter | None] | None
    """The base's parameters (and buffers) that a merge replaced; None if nothing is merged."""
    merged_names: tuple[str, ...]
    """The adapters that are merged."""
    current_copy: str | None
    """Adapter whose trained copies are in use while the rows of a mixed batch run one adapter at a time."""

    @property
    def trained_copies(self) -> nn.ModuleDict:
        """The copies by adapter; as a child they have PEFT's name, which scripts look for in names of parameters."""
        return self._modules.get("modules_to_save", _NO_COPIES)  # type: ignore[return-value]


def wrong_row_count(names: Sequence[str], batch: int | None) -> UsageError:
    """Return the error about names of adapters that are not as many as a batch has rows."""
    given = repr(names) if isinstance(names, str) else f"{len(names)} names"
    message = "Length of `adapter_names` should be the same as the number of inputs, but got "
    hint = f"a list with one name per row; {BASE_ROW!r} is a row without an adapter"
    return UsageError(f"{message}{given} and {batch} rows", hint=hint)
