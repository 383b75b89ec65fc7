"""Learned positions in front of the sequence: what prompt tuning and P-tuning put there, and the config they share.

    [v_1 … v_n, x_1 … x_T] → the backbone → hidden states of x_1 … x_T

The positions enter with the backbone's own input and leave behind its output: above it, in logits, labels, losses and
`generate`, there are T positions as without them.

    padded left      [pad, v, x]: right before the row's first token, so that sliding windows see what they should
    laid end to end  [v, row, row, …]: one v for all, since nothing before it changes it; a mask lets each row see v
                     and itself, and sliding windows count positions
    in the cache     v stands there like tokens: a mark on the cache says so, and a step that goes on adds none
    rows mixed       v stands in front of every row and is masked out where it is not the row's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..attention.packed_layout import SUPPORTED_ATTENTION, original_attention
from ..attention.prefix import PREFIX_KWARG, AttentionPrefix, require_decoder
from ..errors import ModelError, UsageError
from .base import AdapterModule, BaseForward, MergeUnsupported, RowMask, Site, SiteKind
from .config import PeftConfig
from .virtual_tokens import BackboneCall, each, inserted, left


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields that methods with learned positions share. None of the sizes need be given: the model tells them.

    Args:
        num_virtual_tokens: learned positions, 1 and up; typically 10 to 100.
        token_dim: size of a learned position, of the embeddings or of all keys of a layer, 1 and up; None: the model's.
        num_transformer_submodules: 1, for a decoder; None: the same.
        num_attention_heads: heads of the keys, 1 and up; None: the model's.
        num_layers: layers of the model, 1 and up; None: the model's.
        modules_to_save: modules trained whole beside the adapter (a new head), saved with it.
    """

    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("model",)
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens"}

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        """True: learned positions stand in front of the sequence."""
        return True

    def check(self) -> None:
        """Check the sizes, and that a decoder is meant."""
        super().check()
        self.require_whole("num_virtual_tokens")
        for name in ("token_dim", "num_attention_heads", "num_layers"):
            self.require_whole(name, none=True)
        one = self.num_transformer_submodules in (None, 1)
        self.require(one, "num_transformer_submodules", "1: a decoder (2 is an encoder and a decoder)")

    def infer_from_model(self, model: Any) -> None:
        """Fill in the sizes from the model's config."""
        require_decoder(model)
        text = model.config.get_text_config()
        self.num_transformer_submodules = self.num_transformer_submodules or 1
        self.num_layers = self.num_layers or text.num_hidden_layers
        self.num_attention_heads = self.num_attention_heads or text.num_attention_heads
        self.token_dim = self.token_dim or text.hidden_size

    def further_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone."""
        return {find_backbone_name(model): "model"}

    def file_key(self, key: str) -> str:
        """Return PEFT's keys: none of a module for what is learned, and a shorter prefix for modules trained whole."""
        mine = re.search(r"\.(prompt_embeddings|prompt_encoder\..+)$", key)
        return mine[1] if mine else key.replace("base_model.model.", "base_model.", 1)


class PromptModule(AdapterModule):
    """A delta at the backbone; a method defines `virtual`."""

    def virtual(self) -> Tensor:
        """Return the learned positions `(n, hidden)`."""
        raise TypeError(f"{type(self).__name__} defines no virtual()")

    def forward_with_base(self, frozen: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with the learned positions in front, and give the states of the others."""
        call = BackboneCall(frozen.module, args, kwargs)
        learned = self.virtual()
        n = learned.shape[0]
        call.refuse_what_has_no_room(n)
        goes_on, embeds = call.goes_on(self, n), call.embeds()
        mine = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device) if rows is None else rows
        start = call.begin_with(n, mine, goes_on, always=rows is not None)
        if not goes_on:
            front = learned.to(device=embeds.device, dtype=embeds.dtype).expand(len(embeds), -1, -1)
            call.values["inputs_embeds"] = inserted(front, embeds, start, 1)
        out = call.run(frozen, self, n)
        return call.answer(out if goes_on else each(out, lambda h: left(h, start, n)))

    def forward_batch_rows(
        self, frozen: BaseForward, base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the backbone so; in rows that are not meant the learned positions are masked out."""
        return self.forward_with_base(frozen, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: learned positions are no weights."""
        raise MergeUnsupported(f"{type(self).__name__} adds positions, which are no change of a weight")


class AttentionModule(AdapterModule):
    """A delta at the attention module of a layer; a method defines `prefix`."""

    uses_attention_prefix = True

    def prefix(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return the learned keys and values of this layer.

        Args:
            module: the frozen attention module, for methods that use its projections.
            rows: the rows of a mixed batch that are meant, where no other adapter runs; None: all.
        """
        raise TypeError(f"{type(self).__name__} defines no prefix(module, rows)")

    def forward_with_base(self, frozen: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the attention with the prefix in sight."""
        module: Any = frozen.module
        chosen = vars(module)["config"]._attn_implementation
        if original_attention(chosen) not in SUPPORTED_ATTENTION:
            raise ModelError(
                f"{type(module).__name__} runs with attn_implementation={chosen!r}, which takes no prefix here",
                " or ".join(map(repr, SUPPORTED_ATTENTION)),
                'from_pretrained(..., attn_implementation="sdpa")',
            )
        # The innermost stands first, as with learned positions. transformers hands keyword arguments on.
        seen = ((self.prefix(module, rows), rows), *kwargs.pop(PREFIX_KWARG, ()))
        return frozen(*args, **{PREFIX_KWARG: seen}, **kwargs)

    def forward_batch_rows(
        self, frozen: BaseForward, base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The same, in sight of some rows."""
        return self.forward_with_base(frozen, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: keys and values are no weights."""
        raise MergeUnsupported(f"{type(self).__name__} adds keys and values, which are no change of a weight")


class PositionShift(AdapterModule):
    """Lets a row's own positions start at `n`: at the backbone, for prefixes that take the first `n`."""

    @property
    def n(self) -> int:
        """How many positions the prefix takes."""
        raise TypeError(f"{type(self).__name__} defines no n")

    def forward_with_base(self, frozen: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with positions `n` later."""
        call = BackboneCall(frozen.module, args, kwargs)
        call.goes_on(self, 0)
        positions = call.positions()
        call.values["position_ids"] = positions + (self.n if rows is None else self.n * rows[:, None])
        return call.answer(call.run(frozen, self, 0))

    def forward_batch_rows(
        self, frozen: BaseForward, base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the backbone so; rows that are not meant keep their positions."""
        return self.forward_with_base(frozen, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuse: positions are no weights."""
        raise MergeUnsupported("a prefix adds keys and values, which are no change of a weight")


def find_backbone_name(model: Any) -> str:
    """Return the name of the module that maps embeddings to hidden states; "" where it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return name if name in model._modules else ""


class LearnedEmbeddings(AdapterModule):
    """Mixed into a delta that learns `prompt_embeddings`.

    Args:
        site: where.
        start: the parameter's start `(n, width)`, or the encoder: a module that gives them when called.
    """

    def __init__(self, site: Site, start: Tensor | nn.Module) -> None:
        super().__init__()
        if isinstance(start, nn.Module):
            self.prompt_encoder: nn.Module | None = start.to(site.device, site.dtype)
            self.register_parameter("prompt_embeddings", None)
        else:
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(start.detach().to(site.device, site.dtype, copy=True))

    def learned(self) -> Tensor:
        """Return `prompt_embeddings (n, width)`."""
        return self.prompt_embeddings if self.prompt_encoder is None else self.prompt_encoder()

    def tensors(self) -> dict[str, Tensor]:
        """Return what the parameters are, or what the encoder gives without dropout, and the encoder's own."""
        if self.prompt_encoder is None:
            return super().tensors()
        with torch.no_grad(), evaluating(self.prompt_encoder):
            return {"prompt_embeddings": self.learned(), **super().tensors()}

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Let the encoder go where a file holds only what it gave."""
        if self.prompt_encoder is None or any(k.startswith("prompt_encoder.") for k in given):
            return
        there = given.get("prompt_embeddings")
        now = self.tensors()["prompt_embeddings"]
        if there is not None and there.shape == now.shape:
            trains = any(p.requires_grad for p in self.parameters())
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(now, requires_grad=trains)


def token_ids(text: str, tokenizer: str, settings: dict[str, Any] | None) -> list[int]:
    """Return the tokens of a text, special ones included, by a tokenizer's name or folder.

    Raises:
        UsageError: there is no such tokenizer.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, **(settings or {}))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"tokenizer_name_or_path {tokenizer!r} gives no tokenizer: {str(e).splitlines()[0]}",
            "a folder with a tokenizer, or a Hub id that can be reached",
            "name the base's own folder; in a recipe, the model's name means the model's tokenizer",
        ) from None
    ids: list[int] = loaded(text)["input_ids"]
    return ids


@contextmanager
def frozen_base(model: Any) -> Iterator[Any]:
    """Give a model without its adapters, in evaluation mode and without gradients, for the length of the `with`."""
    alone = model.disable_adapter() if hasattr(model, "disable_adapter") and hasattr(model, "peft_config") else None
    with torch.no_grad(), evaluating(model), alone or nullcontext():
        yield model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each part of it back into its own after."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
