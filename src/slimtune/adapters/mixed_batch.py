"""Which adapters run: one selection for the whole batch, or a different adapter for each row of a mixed batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.register import LAYOUT_KWARG
from ..errors import UsageError, format_names, nearest
from ..kernels.lora_linear import list_equal_group_adapters, stack_mixed_batch_lora
from .invocation import ChangedTokens, Offsets, find_running_invocations, fix_invocations, select_tokens

BASE_ROW = "__base__"
"""PEFT's name for a row of a mixed batch that runs the base without an adapter."""


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
            raise _wrong_row_count(names, batch)
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


class CallMixin:
    """The part of `PeftModel` that runs the model."""

    def __call__(
        self: Any,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Offsets | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model like its base; in training, the methods' regularization is added to the loss.

        `adapter_names` gives one adapter per row for a mixed batch; "__base__" is a row without an adapter.
        `alora_offsets` gives the number of last tokens of each row that an activated LoRA changes; None: those from
        the invocation tokens on.
        """
        state = self._adapter_state
        if adapter_names is None and not find_running_invocations(state.active_state, state.configs):
            out = super().__call__(*args, **kwargs)  # type: ignore[misc]  # torch.compile stops at a `with`
        else:
            with (
                self._select_row_adapters(adapter_names, args, kwargs),
                select_tokens(state.active_state, state.configs, args, kwargs, alora_offsets) as store_starts,
            ):
                self._keep_selection_in_checkpoints()
                out = super().__call__(*args, **kwargs)  # type: ignore[misc]
                store_starts(out)
        for name in adapter_names or state.active_state.names:
            if name != BASE_ROW and state.configs[name].is_prompt_learning and "encoder_outputs" not in kwargs:
                state.configs[name].require_reached(self.adapter_modules(name))
        if self.training and getattr(out, "loss", None) is not None:
            penalty = self.regularization_loss()
            if penalty is not None:
                out.loss = out.loss + penalty
        return out

    def generate(
        self: Any,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        alora_offsets: Offsets | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate like the base; further arguments as in a call. All beams of a row use the row's adapter."""
        state = self._adapter_state
        with (
            self._select_row_adapters(adapter_names, args, kwargs),
            fix_invocations(state.active_state, state.configs, args, kwargs, alora_offsets),
        ):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def regularization_loss(self: Any) -> Tensor | None:
        """Return the sum of what the active adapters' methods add to a training loss, or None."""
        state = self._adapter_state
        names = state.active_state.active if state.active_state.enabled else []
        terms = [state.configs[n].regularization_loss(self.adapter_modules(n)) for n in names]
        terms = [t for t in terms if t is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def update_and_allocate(self: Any, global_step: int) -> None:
        """Run the active methods' step hooks (AdaLoRA reallocates rank).

        Call it after `optimizer.step()` and before the gradients are cleared; `global_step` counts from 1.
        """
        for name in self.active_adapters:
            self.peft_config[name].on_step_end(self.adapter_modules(name), global_step)

    def _set_gradient_checkpointing(self: Any, enable: bool = True, **kwargs: Any) -> None:
        # Both public functions of transformers call this one. Reentrant checkpointing computes no gradients unless
        # an input requires one, so the frozen embedding's output must; the other kind does not need that.
        super()._set_gradient_checkpointing(enable=enable, **kwargs)  # type: ignore[misc]
        settings = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        if enable and settings.get("use_reentrant", True):
            self._require_input_gradients()

    def _require_input_gradients(self: Any) -> None:
        if not self._adapter_state.input_gradients and hasattr(self, "enable_input_require_grads"):
            self.enable_input_require_grads()
            self._adapter_state.input_gradients = True

    def _keep_selection_in_checkpoints(self: Any) -> None:
        active = self._adapter_state.active_state
        if active.row_adapters is None and active.changed_tokens is None:
            return
        for module in self.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(checkpoint, CheckpointSelection):
                module._gradient_checkpointing_func = CheckpointSelection(checkpoint, active)

    @contextmanager
    def _select_row_adapters(self: Any, names: Sequence[str] | None, args: tuple, kwargs: dict) -> Iterator[None]:
        if names is None or not self._adapter_state.active_state.enabled:
            yield
            return
        self._check_row_adapters(names, args, kwargs)
        active = self._adapter_state.active_state
        active.row_adapters = tuple(names)
        active.call_id += 1
        try:
            yield
        finally:
            active.row_adapters = None

    def _check_row_adapters(self: Any, names: Sequence[str], args: tuple, kwargs: dict) -> None:
        if LAYOUT_KWARG in kwargs:
            hint = "make_collator(model, pad_token_id, packing=False), or set_adapter for one adapter for all rows"
            raise UsageError("adapter_names is given for a packed batch, which is a single row", hint=hint)
        inputs = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values", "attention_mask")
        candidates = [*args[:1], *(kwargs.get(n) for n in inputs)]
        batch = next((int(v.shape[0]) for v in candidates if isinstance(v, Tensor) and v.dim()), None)
        if isinstance(names, str) or (batch is not None and len(names) != batch):
            raise _wrong_row_count(names, batch)
        known = [*self.peft_config, BASE_ROW]
        if unknown := [n for n in dict.fromkeys(names) if n not in known]:
            # PEFT's words, as in the errors below.
            message = f"Trying to infer with non-existing adapter(s): {', '.join(map(str, sorted(unknown)))}"
            raise UsageError(message + nearest(unknown[0], known), f"one of {format_names(known)}")
        if self.merged_adapters:
            what = "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            raise UsageError(what)
        active = self._adapter_state.active_state
        if active.layers_with_own:
            raise UsageError(
                "adapter_names is given after adapters were chosen for a layer", hint="model.set_adapter(…)"
            )
        if active.row_adapters is not None:
            raise UsageError("another call with adapter_names is still running", "one such call at a time per model")


def _wrong_row_count(names: Sequence[str], batch: int | None) -> UsageError:
    given = repr(names) if isinstance(names, str) else f"{len(names)} names"
    message = "Length of `adapter_names` should be the same as the number of inputs, but got "
    hint = f"a list with one name per row; {BASE_ROW!r} is a row without an adapter"
    return UsageError(f"{message}{given} and {batch} rows", hint=hint)
