"""Runs a model with adapters: the active ones for all rows, or a different adapter for each row of a mixed batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..core.adapters.active_adapters import BASE_ROW, CheckpointSelection, wrong_row_count
from ..core.attention.attention_functions import LAYOUT_KWARG
from ..errors import UsageError, format_names, nearest
from .alora_invocation import Offsets, find_active_invocation_tokens, fix_invocations, select_tokens


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
        if adapter_names is None and not find_active_invocation_tokens(state.active_state, state.configs):
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
            raise wrong_row_count(names, batch)
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
