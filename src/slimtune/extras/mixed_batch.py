"""Mixed batches: a different adapter for each row of a call, `model(ids, adapter_names=["one", "two", "__base__"])`.

Linear layers whose adapters all have low-rank factors run them stacked, in one product for all rows. The stacks are
kept from call to call, since generation runs a layer for every token. Other layers run one adapter after the other.

    y[b] += s_b · B_b A_b x[b]             A_b (r_b, in), B_b (out, r_b): the factors of row b's adapter

The batch is divided into n groups of equal size whose rows use one adapter. The factors are stacked once per group,
with zeros in place of missing ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapters.active_adapters import BASE_ROW, ActiveAdapters
from ..core.adapters.adapted_layer import AdaptedLayerMixin
from ..core.adapters.adapter_module import BaseForward
from ..core.adapters.peft_model import PeftModel
from ..core.attention.attention_functions import LAYOUT_KWARG
from ..core.kernels.linear_layers import get_base_layer_type
from ..errors import MixedBatchError, UsageError, format_names, suggest


class MixedBatchCallsMixin(PeftModel):
    """Mixed into adapted models: calls with `adapter_names`."""

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model like its base; in training, the methods' regularization is added to the loss.

        `adapter_names` gives one adapter per row for a mixed batch; "__base__" is a row without an adapter.
        """
        if adapter_names is None:
            return super().__call__(*args, **kwargs)  # torch.compile stops at a `with`
        with _select_row_adapters(self, adapter_names, args, kwargs):
            make_checkpointing_keep_row_adapters(self)
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate like the base; further arguments as in a call. All beams of a row use the row's adapter."""
        with _select_row_adapters(self, adapter_names, args, kwargs):
            return super().generate(*args, **kwargs)

    def must_prepare_call(self, kwargs: Mapping[str, Any]) -> bool:
        return "adapter_names" in kwargs or super().must_prepare_call(kwargs)


class _MixedBatchLoraCacheEntry(NamedTuple):
    """The low-rank factors of one layer's rows, stacked, and what they were built from."""

    call: tuple
    """Number of the last call that used them, its batch size and dtype."""
    factors: tuple[Tensor, Tensor]
    """`A (groups, r, in)` and `B (groups, out, r)`, scale included."""
    key: tuple
    """Identifies the row groups and the state of the source tensors; equal keys mean equal stacks."""
    sources: list[Tensor]
    """The source tensors, kept alive so that their `id` in `key` is not reused."""


class _MixedBatchRunner:
    """Runs the adapted layers of one model during its mixed calls."""

    def __init__(self, active: ActiveAdapters) -> None:
        self.active = active
        self.call_id = 0
        self.stacks: dict[nn.Module, _MixedBatchLoraCacheEntry] = {}
        self._masks: dict[tuple, dict[str, Tensor]] = {}

    def run_layer(self, layer: AdaptedLayerMixin, base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a layer with each row's adapter."""
        x: Tensor = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        cached = self._get_cached_factors(layer, x)
        if cached is not None:
            return add_low_rank_per_row(base(*args, **kwargs), x, *cached)
        masks = self.get_row_masks(x.shape[0], x.device)
        copies = layer.trained_copies
        # A module that has nothing but children has a copy without tensors.
        own = {n: [*copies[n].parameters(), *copies[n].buffers()] for n in masks if n in copies}
        with_copies = {n: rows for n, rows in masks.items() if own.get(n)}
        modules: dict[str, Any] = {n: layer.adapters[n] for n in masks if n in layer.adapters}
        plain_base = base
        if with_copies:
            base = partial(_run_trained_copies, layer, plain_base, with_copies)
        if not modules:
            return base(*args, **kwargs)
        inner = (m for module in modules.values() if module.training for m in module.modules())
        drops_inputs = any(isinstance(m, nn.Dropout) and m.p > 0 for m in inner)
        if get_base_layer_type(layer) == "linear" and not with_copies and not drops_inputs:
            factors = {n: m.low_rank_factors() for n, m in modules.items()}
            if all(f is not None for f in factors.values()):
                return add_low_rank_per_row(base(*args, **kwargs), x, *self._stack_factors(layer, x, factors))

        def nest(run: Callable[..., Any]) -> Callable[..., Any]:
            plain = BaseForward(layer, plain_base if run is base else run)
            for name, module in modules.items():
                tokens = layer.find_changed_tokens(name, module, args)
                run = partial(_run_rows, layer, name, module, BaseForward(layer, run), plain, masks[name], **tokens)
            return run

        return layer.run_nested(nest, base, args, kwargs)

    def get_row_masks(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """Return for each adapter of the call which rows of a batch use it, as a bool `(batch,)`."""
        key = (self.active.row_adapters, batch, device)
        if key not in self._masks:
            rows = self._expand_row_adapters(batch)
            self._masks.clear()
            with torch.inference_mode(False):  # later calls may need gradients
                names = [n for n in dict.fromkeys(rows) if n != BASE_ROW]
                self._masks[key] = {n: torch.tensor([row == n for row in rows], device=device) for n in names}
        return self._masks[key]

    def _expand_row_adapters(self, batch: int) -> list[str]:
        """Return each row's adapter in a batch; beam search repeats every row."""
        names = self.active.row_adapters
        assert names is not None
        if not names or batch % len(names):
            raise _wrong_row_count(names, batch)
        return [n for n in names for _ in range(batch // len(names))]

    def _get_cached_factors(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the factors stacked for a layer earlier in this call (generation runs it often), or None."""
        if torch.is_grad_enabled() or (stack := self.stacks.get(layer)) is None:
            return None
        return stack.factors if stack.call == (self.call_id, x.shape[0], x.dtype) else None

    def _stack_factors(self, layer: nn.Module, x: Tensor, factors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the stacked factors for the rows of a layer's input `x (batch, ..., in)`.

        `factors` are `(A, B, scale)` by adapter name. Without gradients, an earlier stack is reused if nothing changed.
        """
        groups = list_adapter_per_equal_row_group(self._expand_row_adapters(x.shape[0]))
        if torch.is_grad_enabled():
            return stack_lora_factors_scaled_into_b([factors.get(n) for n in groups], x)
        sources = [t for A, B, _ in factors.values() for t in (A, B)]
        # Fused optimizers do not raise a tensor's version counter: factors that train are stacked for every call.
        frozen = not any(t.requires_grad or t.is_inference() for t in sources)
        versions = [(id(t), t._version, t.data_ptr()) for t in sources] if frozen else [self.call_id]
        key = (groups, x.dtype, list(factors), [s for _, _, s in factors.values()], versions)
        old = self.stacks.get(layer)
        reused = old is not None and old.key == key
        stacked = old.factors if reused else stack_lora_factors_scaled_into_b([factors.get(n) for n in groups], x)  # type: ignore[union-attr]
        call = (self.call_id, x.shape[0], x.dtype)
        self.stacks[layer] = _MixedBatchLoraCacheEntry(call, stacked, key, sources)
        return stacked


def _run_rows(layer: AdaptedLayerMixin, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
    with layer.use_copies(name):
        return module.forward_batch_rows(*args, **kwargs)


def _run_trained_copies(
    layer: AdaptedLayerMixin, base: Callable[..., Any], masks: Mapping[str, Tensor], x: Tensor, **kwargs: Any
) -> Any:
    with layer.use_copies(None):
        y = base(x, **kwargs)
    if not isinstance(y, Tensor):
        message = (
            f"a {type(layer).__name__} does not return one tensor, so its rows cannot use different trained copies"
        )
        raise MixedBatchError(message, "modules whose output is one tensor: Linear, Embedding, convolutions")
    for name, rows in masks.items():
        with layer.use_copies(name):
            y = y.index_put((rows,), base(x[rows], **kwargs))
    return y


# --- the selection of a call ------------------------------------------------------------------------------------------


@contextmanager
def _select_row_adapters(model: PeftModel, names: Sequence[str] | None, args: tuple, kwargs: dict) -> Iterator[None]:
    """Inside the `with`, each row uses its own adapter; None: all use the active ones."""
    active = model.adapter_state.active_state
    if names is None or not active.enabled:
        yield
        return
    _check_row_adapters(model, names, args, kwargs)
    runner = active.caches.setdefault("mixed_batch", _MixedBatchRunner(active))
    runner.call_id += 1
    active.row_adapters, active.layer_runner = tuple(names), runner
    try:
        yield
    finally:
        active.row_adapters = active.layer_runner = None


def _check_row_adapters(model: PeftModel, names: Sequence[str], args: tuple, kwargs: dict) -> None:
    if LAYOUT_KWARG in kwargs:
        hint = "make_collator(model, pad_token_id, packing=False), or set_adapter for one adapter for all rows"
        raise UsageError("adapter_names is given for a packed batch, which is a single row", hint=hint)
    inputs = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values", "attention_mask")
    candidates = [*args[:1], *(kwargs.get(n) for n in inputs)]
    batch = next((int(v.shape[0]) for v in candidates if isinstance(v, Tensor) and v.dim()), None)
    if isinstance(names, str) or (batch is not None and len(names) != batch):
        raise _wrong_row_count(names, batch)
    known = [*model.peft_config, BASE_ROW]
    if unknown := sorted({str(n) for n in names if n not in known}):
        message = f"adapter_names has {format_names(unknown)}, which the model does not have"
        raise UsageError(message + suggest(unknown[0], known), f"names among {format_names(known)}")
    if merged := model.merged_adapters:
        message = f"adapter_names is given while {format_names(merged)} is merged into the base"
        raise UsageError(message, hint="unmerge_adapter() first", code="merge-differs")
    active = model.adapter_state.active_state
    if active.layers_with_own:
        raise UsageError("adapter_names is given after adapters were chosen for a layer", hint="model.set_adapter(…)")
    if active.row_adapters is not None:
        raise UsageError("another call with adapter_names is still running", "one such call at a time per model")


def _wrong_row_count(names: Sequence[str], batch: int | None) -> UsageError:
    given = repr(names) if isinstance(names, str) else f"{len(names)} names"
    message = f"adapter_names has {given} for {batch} rows"
    return UsageError(message, "one name per row", f"{BASE_ROW!r} is a row without an adapter")


class _CheckpointSelection:
    """Activation checkpointing that recomputes a layer with the rows' adapters and tokens of its forward pass."""

    def __init__(self, checkpoint: Callable[..., Any], active: ActiveAdapters) -> None:
        self.checkpoint, self.active = checkpoint, active

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = self.active
        selection = {n: getattr(active, n) for n in ("row_adapters", "layer_runner", "alora_token_positions")}

        def run_with_selection(*args: Any, **kwargs: Any) -> Any:
            before = {n: getattr(active, n) for n in selection}
            vars(active).update(selection)
            try:
                return run(*args, **kwargs)
            finally:
                vars(active).update(before)

        return self.checkpoint(run_with_selection, *args, **kwargs)


def make_checkpointing_keep_row_adapters(model: PeftModel) -> None:
    """Let activation checkpointing recompute the layers with the selection of their forward pass."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointSelection):
            module._gradient_checkpointing_func = _CheckpointSelection(checkpoint, model.adapter_state.active_state)  # type: ignore[assignment]


def list_adapter_per_equal_row_group(row_adapters: Sequence[str]) -> list[str]:
    """Return one adapter name per group, after the rows are split, in order, into the largest groups of equal size with
    one adapter each: `["a", "a", "b", "b", "b", "b"]` gives `["a", "b", "b"]`."""
    size = math.gcd(*(len(list(run)) for _, run in itertools.groupby(row_adapters)))
    return list(row_adapters[::size])


def stack_lora_factors_scaled_into_b(
    factors_by_row_group: Sequence[tuple[Tensor, Tensor, float] | None], layer_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `A (n, r, in)` and `B (n, out, r)`, scales included, in the dtype of `layer_input`.

    Args:
        factors_by_row_group: `(A (r, in), B (out, r), scale)` per group, None for a group without an update.
        layer_input: the layer's input.
    """
    given = [f for f in factors_by_row_group if f is not None]
    rank, (A0, B0, _) = max(A.shape[0] for A, _, _ in given), given[0]
    if torch.is_grad_enabled():
        zero = A0.new_zeros(rank, A0.shape[1]), B0.new_zeros(B0.shape[0], rank), 1.0
        filled = [zero if f is None else f for f in factors_by_row_group]
        A = torch.stack([F.pad(A.to(layer_input.dtype), (0, 0, 0, rank - A.shape[0])) for A, _, _ in filled])
        return A, torch.stack([F.pad(B.to(layer_input.dtype), (0, rank - B.shape[1])) * s for _, B, s in filled])
    # Without gradients each value is written once, in its place: a mixed batch is 8 % faster than with the above.
    A, B = (
        layer_input.new_zeros(len(factors_by_row_group), *shape) for shape in ((rank, A0.shape[1]), (len(B0), rank))
    )
    for group, factors in enumerate(factors_by_row_group):
        if factors is not None:
            group_rank = factors[0].shape[0]
            A[group, :group_rank].copy_(factors[0])
            B[group, :, :group_rank].copy_(factors[1])
    scales = B.new_tensor([1.0 if f is None else f[2] for f in factors_by_row_group])
    return A, B.mul_(scales.view(-1, 1, 1))


def add_low_rank_per_row(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `y (batch, ..., out)` plus each row's own update of `x (batch, ..., in)` (see above)."""
    n = A.shape[0]
    z = torch.bmm(x.reshape(n, -1, x.shape[-1]), A.transpose(1, 2))
    return torch.baddbmm(y.reshape(n, -1, y.shape[-1]), z, B.transpose(1, 2)).view_as(y)
