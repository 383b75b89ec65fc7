"""Learned positions in front of the sequence: what prompt tuning and P-tuning put there, and the config they share.

    [v_1 … v_n, x_1 … x_T] → the backbone → hidden states of x_1 … x_T

The positions enter in front of the backbone's own input and leave behind its output: above it, in logits, labels,
losses and `generate`, there are T positions as without them. Each row's own positions count on from n whatever its
padding; rows laid end to end are run as rows of a batch, each behind its own learned positions. In the cache the
learned positions stand first: a mark on the cache says so, and a step that goes on from it puts none in front.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from .config import PeftConfig
from .delta import Delta, Frozen, Kind, MergeRefused, Rows


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields that methods with learned positions share. None of the sizes need be given: the model tells them.

    Args:
        num_virtual_tokens: learned positions, 1 and up; typically 10 to 100.
        token_dim: size of a learned position: of the embeddings, or of all keys of a layer.
        num_transformer_submodules: 1 for a decoder.
        num_attention_heads: heads of the keys.
        num_layers: layers of the model.
        modules_to_save: modules trained whole beside the adapter (a new head), saved with it.
    """

    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("model",)
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens"}

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """Yes."""
        return True

    def check(self) -> None:
        """Check that the number of learned positions is one."""
        super().check()
        n = self.num_virtual_tokens
        self.require(isinstance(n, int) and n > 0, "num_virtual_tokens", "a whole number, 1 and up")

    def fill(self, model: Any) -> None:
        """Fill in the sizes from the model's config."""
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or not is_decoder(model):
            raise ModelError(
                f"a {type(model).__name__} takes no learned positions here",
                "a decoder (Llama, Mistral, Qwen, Gemma, GPT-2 …)",
                "tune this model by LoRA, IA3 or bottleneck adapters",
            )
        text = config.get_text_config()
        self.num_transformer_submodules = self.num_transformer_submodules or 1
        self.num_layers = self.num_layers or text.num_hidden_layers
        self.num_attention_heads = self.num_attention_heads or text.num_attention_heads
        self.token_dim = self.token_dim or text.hidden_size

    def further_targets(self, model: Any) -> dict[str, Kind]:
        """Return the backbone."""
        return {backbone_name(model): "model"}


class Prompt(Delta):
    """A delta at the backbone; a method defines `virtual`."""

    def virtual(self) -> Tensor:
        """Return the learned positions `(n, hidden)`."""
        raise TypeError(f"{type(self).__name__} defines no virtual()")

    def around(self, frozen: Frozen, *args: Any, rows: Rows = None, **kwargs: Any) -> Any:
        """Run the backbone with the learned positions in front, and give the states of the others."""
        given = _Given(frozen.module, args, kwargs)
        if given.is_pack():
            return given.spread(lambda **unpacked: self.around(frozen, rows=rows, **unpacked))
        learned = self.virtual()
        n, marks = learned.shape[0], given.marks()
        if given.past() and marks.get(id(self)) != n:
            raise UsageError(
                "the cache was filled without this adapter's learned positions",
                "a cache from the same adapter",
                "start with an empty cache",
            )
        going_on = given.past() > 0
        embeds = given.embeds()
        batch = embeds.shape[0]
        shown = torch.ones(batch, n, dtype=torch.bool, device=embeds.device)
        shown = shown if rows is None else shown & rows[:, None]
        given.shift(shown.sum(1), 0 if going_on else n, hidden=None if rows is None else shown)
        given.widen(shown, going_on, always=rows is not None)
        if not going_on:
            given.put_first(learned.to(embeds.dtype).expand(batch, -1, -1))
        out = frozen(**given.values)
        given.mark(out, id(self), n)
        return out if going_on else _cut(out, n)

    def in_rows(self, frozen: Frozen, base: Frozen, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same; in the other rows the learned positions are masked out."""
        return self.around(frozen, *args, rows=rows, **kwargs)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: learned positions are no weights."""
        raise MergeRefused(f"{type(self).__name__} adds positions, which are no change of a weight")


class Shift(Delta):
    """Lets a model's own positions start at `n` (a parameter-free delta at the backbone, for prefixes)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def around(self, frozen: Frozen, *args: Any, rows: Rows = None, **kwargs: Any) -> Any:
        """Run the backbone with positions `n` later."""
        given = _Given(frozen.module, args, kwargs)
        batch = given.embeds().shape[0]
        by = torch.full((batch,), self.n, device=given.embeds().device)
        given.shift(by if rows is None else by * rows, 0)
        return frozen(**given.values)

    def in_rows(self, frozen: Frozen, base: Frozen, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same for some rows."""
        return self.around(frozen, *args, rows=rows, **kwargs)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: positions are no weights."""
        raise MergeRefused("a prefix adds keys and values, which are no change of a weight")


class _Given:
    """The inputs of one call of a backbone, by the names of its forward."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.module = module
        names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
        self.values: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        # transformers 5.2x calls it cache, before that past_key_values.
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        if self.cache_name == "cache" and "past_key_values" in self.values:
            self.values["cache"] = self.values.pop("past_key_values")
        if isinstance(self.values.get("attention_mask"), dict):
            raise UsageError(
                "the attention mask is one for each kind of layer, prepared for a static cache",
                "a mask (batch, length)",
                'generate(..., cache_implementation="dynamic")',
            )

    @property
    def cache(self) -> Any:
        return self.values.get(self.cache_name)

    def past(self) -> int:
        """Return how many positions the cache holds."""
        return int(self.cache.get_seq_length()) if self.cache is not None else 0

    def marks(self) -> dict[int, int]:
        return getattr(self.cache, "_learned_positions", {})

    def mark(self, out: Any, who: int, n: int) -> None:
        """Note on the cache that it starts with `n` learned positions."""
        cache = self.cache if self.cache is not None else getattr(out, self.cache_name, None)
        if cache is not None:
            cache._learned_positions = {**getattr(cache, "_learned_positions", {}), who: n}

    def embeds(self) -> Tensor:
        """Return the input as embeddings `(batch, length, hidden)`; looked up once."""
        if self.values.get("inputs_embeds") is None:
            self.values["inputs_embeds"] = self.module.get_input_embeddings()(self.values.pop("input_ids"))  # type: ignore[operator]
        self.values.pop("input_ids", None)
        return self.values["inputs_embeds"]

    def is_pack(self) -> bool:
        """Return whether rows lie end to end: positions that start over, and no mask."""
        positions = self.values.get("position_ids")
        if positions is None or positions.dim() != 2 or self.values.get("attention_mask") is not None:
            return False
        return positions.shape[1] > 1 and bool((positions.diff(dim=1) != 1).any())

    def spread(self, run: Any) -> Any:
        """Run rows that lie end to end as rows of a batch, padded right, and lay the answers end to end again."""
        embeds, positions = self.embeds(), self.values.pop("position_ids")
        batch, length, width = embeds.shape
        starts = torch.ones_like(positions, dtype=torch.bool).expand(batch, -1).clone()
        starts[:, 1:] = positions.diff(dim=1) != 1
        row = starts.flatten().cumsum(0) - 1
        first = starts.flatten().nonzero().flatten()
        column = torch.arange(batch * length, device=embeds.device) - first[row]
        shape = int(row[-1]) + 1, int(column.max()) + 1
        spread = embeds.new_zeros(*shape, width).index_put((row, column), embeds.reshape(-1, width))
        mask = torch.zeros(shape, dtype=torch.long, device=embeds.device).index_put((row, column), torch.ones_like(row))
        out = run(**{**self.values, "inputs_embeds": spread, "attention_mask": mask, "use_cache": False})
        return _each(out, lambda h: h[row, column].view(batch, length, -1), shape[1])

    def shift(self, by: Tensor, in_front: int, hidden: Tensor | None = None) -> None:
        """Move each row's positions `by` (batch,) later; `in_front` learned ones will stand before them."""
        positions, mask = self.values.get("position_ids"), self.values.get("attention_mask")
        length, batch = self.embeds().shape[1], self.embeds().shape[0]
        if positions is None:
            if mask is not None and mask.dim() == 2:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            else:
                learned = sum(self.marks().values())
                positions = torch.arange(length, device=by.device)[None] + max(0, self.past() - learned)
        own = positions.expand(*positions.shape[:-2], batch, length) + by[:, None]
        if in_front:
            front = torch.arange(in_front, device=by.device).expand(batch, -1)
            if hidden is not None:
                front = front * hidden
            own = torch.cat([front.expand(*own.shape[:-2], -1, -1), own], dim=-1)
        self.values["position_ids"] = own

    def widen(self, shown: Tensor, going_on: bool, *, always: bool) -> None:
        """Let the mask begin with the learned positions."""
        mask, length = self.values.get("attention_mask"), self.embeds().shape[1]
        batch, n = shown.shape
        if mask is None:
            if not always:
                return
            held = self.past() - sum(self.marks().values())
            mask = torch.ones(batch, max(0, held) + length, dtype=torch.long, device=shown.device)
        if mask.dim() == 2:
            self.values["attention_mask"] = torch.cat([shown.to(mask.dtype), mask], dim=1)
            return
        yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        q = mask.shape[2]
        mask = mask.expand(batch, -1, -1, -1)
        columns = torch.full((batch, mask.shape[1], q, n), yes, dtype=mask.dtype, device=mask.device)
        mask = torch.cat([columns.masked_fill(~shown[:, None, None, :], no), mask], dim=3)
        if not going_on:
            top = torch.full((batch, mask.shape[1], n, mask.shape[3]), no, dtype=mask.dtype, device=mask.device)
            among = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()[None, None] & shown[:, None, None, :]
            top[..., :n] = top[..., :n].masked_fill(among.expand(-1, mask.shape[1], -1, -1), yes)
            mask = torch.cat([top, mask], dim=2)
        self.values["attention_mask"] = mask

    def put_first(self, learned: Tensor) -> None:
        """Put the learned positions `(batch, n, hidden)` in front of the embeddings."""
        self.values["inputs_embeds"] = torch.cat([learned, self.embeds()], dim=1)


def _cut(out: Any, n: int) -> Any:
    return _each(out, lambda h: h[:, n:], None)


def _each(out: Any, change: Any, length: int | None) -> Any:
    """Return a backbone's output with `change` made to each of its hidden states."""
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    states = getattr(out, "hidden_states", None)
    changed = {"last_hidden_state": change(out.last_hidden_state)}
    if states is not None:
        changed["hidden_states"] = tuple(change(s) for s in states)
    return replace(out, **changed)


def backbone_name(model: Any) -> str:
    """Return the name of the module that maps embeddings to hidden states; "" where it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return name if name and isinstance(getattr(model, name, None), nn.Module) else ""


def is_decoder(model: Any) -> bool:
    """Return whether a model reads from left to right: it generates, or its attention modules say so."""
    if hasattr(model, "can_generate") and model.can_generate():
        return True
    return any(getattr(m, "is_causal", False) for m in model.modules() if "attention" in type(m).__name__.lower())
