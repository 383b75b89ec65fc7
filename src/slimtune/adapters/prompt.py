"""Base classes of prompt learning: virtual tokens before the sequence, learned keys and values in the attention.

    prompt tuning, P-tuning           [v_1 … v_n, x_1 … x_T] → backbone → hidden states of x_1 … x_T     `PromptModule`
    prefix tuning, LLaMA-Adapter      n learned keys and values in the attention of every layer       `AttentionModule`

Virtual tokens enter with the backbone's input and are removed from its output: everything above it (logits, labels,
losses, `generate`) has T positions, as without them. `virtual_tokens.py` changes positions, masks and cache:

    left padding      [pad, v, x]: right before the first token, so that sliding windows cover the right tokens
    packed sequence   [v, row, row, …]: one v for all rows, since nothing before v changes it; the mask shows each row v
                      and itself, and sliding windows count positions
    cache             v is stored like tokens; a mark on the cache records it, and later steps add no v
    mixed batch       v stands before every row, and is masked out in rows that use another adapter
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..attention.prefix import PREFIX_KWARG, AttentionPrefix, RowMask, require_decoder
from ..attention.register import SUPPORTED_ATTENTION, original_attention
from ..errors import ModelError, UsageError
from .base import AdapterModule, BaseForward, MergeUnsupported, Site, SiteKind
from .config import PeftConfig
from .config_fields import setting
from .virtual_tokens import BackboneCall, insert_columns, map_hidden_states, remove_columns


@dataclass
class PromptLearningConfig(PeftConfig):
    """The fields that prompt-learning methods share; sizes that are not given are taken from the model."""

    mergeable: ClassVar[bool] = False
    kinds: ClassVar[tuple[SiteKind, ...]] = ("model",)
    is_prompt_learning: ClassVar[bool] = True
    short_names: ClassVar[dict[str, str]] = {"tokens": "num_virtual_tokens"}

    num_virtual_tokens: int | None = setting(None, "number of virtual tokens, typically 10 to 100", ge=1)
    token_dim: int | None = setting(
        None, "size of a virtual token: of the embeddings, or of all keys of a layer; None: the model's", ge=1
    )
    num_transformer_submodules: int | None = setting(None, "1, for a decoder; None: 1")
    num_attention_heads: int | None = setting(None, "number of key heads; None: the model's", ge=1)
    num_layers: int | None = setting(None, "number of layers; None: the model's", ge=1)
    modules_to_save: list[str] | None = setting(
        None, "modules trained in full beside the adapter (a new head) and saved with it"
    )

    def check(self) -> None:
        """Check that the number of tokens is given and that the model is a decoder."""
        super().check()
        self.require(self.num_virtual_tokens is not None, "num_virtual_tokens", "an integer, at least 1")
        decoder = self.num_transformer_submodules in (None, 1)
        self.require(decoder, "num_transformer_submodules", "1: a decoder (2 is an encoder and a decoder)")

    def infer_from_model(self, model: Any) -> None:
        """Take the sizes that are not given from the model's config."""
        require_decoder(model)
        text = model.config.get_text_config()
        self.num_transformer_submodules = self.num_transformer_submodules or 1
        self.num_layers = self.num_layers or text.num_hidden_layers
        self.num_attention_heads = self.num_attention_heads or text.num_attention_heads
        self.token_dim = self.token_dim or text.hidden_size

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the backbone."""
        return {find_backbone_name(model): "model"}

    def file_key(self, key: str) -> str:
        """Return PEFT's keys: learned tensors without a module name, modules trained in full with a shorter prefix."""
        learned = re.search(r"\.(prompt_embeddings|prompt_encoder\..+)$", key)
        return learned[1] if learned else key.replace("base_model.model.", "base_model.", 1)


class PromptModule(AdapterModule):
    """Adapter module at the backbone that adds virtual tokens; a method defines `virtual_embeddings`."""

    def virtual_embeddings(self) -> Tensor:
        """Return the embeddings of the virtual tokens `(n, hidden)`."""
        raise TypeError(f"{type(self).__name__} does not define virtual_embeddings()")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with the virtual tokens in front, and return the hidden states of the other tokens."""
        call = BackboneCall(base.module, args, kwargs)
        virtual = self.virtual_embeddings()
        n = virtual.shape[0]
        call.check_virtual_tokens_fit(n)
        cached, embeds = call.has_cached_tokens(self, n), call.get_embeddings()
        own_rows = torch.ones(len(embeds), dtype=torch.bool, device=embeds.device) if rows is None else rows
        start = call.add_virtual_tokens(n, own_rows, cached, need_mask=rows is not None)
        if not cached:
            virtual = virtual.to(device=embeds.device, dtype=embeds.dtype).expand(len(embeds), -1, -1)
            call.inputs["inputs_embeds"] = insert_columns(virtual, embeds, start, 1)
        out = call.run(base, self, n)
        if not cached:
            out = map_hidden_states(out, lambda h: remove_columns(h, start, n))
        return call.format_output(out)

    def forward_batch_rows(
        self, base: BaseForward, plain_base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the backbone with the virtual tokens, masked out in rows that use another adapter."""
        return self.forward_with_base(base, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raise: virtual tokens do not change weights."""
        raise MergeUnsupported(f"{type(self).__name__} adds virtual tokens, which do not change a weight")


class PositionShift(AdapterModule):
    """Adapter module at the backbone that starts the tokens' positions at `n`, for prefixes that take the first `n`."""

    @property
    def n(self) -> int:
        """Number of positions that the prefix takes."""
        raise TypeError(f"{type(self).__name__} does not define n")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with all positions increased by `n`."""
        call = BackboneCall(base.module, args, kwargs)
        call.has_cached_tokens(self, 0)
        positions = call.get_position_ids()
        call.inputs["position_ids"] = positions + (self.n if rows is None else self.n * rows[:, None])
        return call.format_output(call.run(base, self, 0))

    def forward_batch_rows(
        self, base: BaseForward, plain_base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the backbone with positions increased in the rows that use this adapter."""
        return self.forward_with_base(base, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raise: positions are not weights."""
        raise MergeUnsupported("a prefix adds keys and values, which do not change a weight")


class AttentionModule(AdapterModule):
    """Adapter module at a layer's attention that adds learned keys and values; a method defines `prefix`."""

    uses_attention_prefix = True

    def compute_prefix(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return the learned keys and values of this layer.

        Args:
            module: the frozen attention module, for methods that use its projections.
            rows: which rows of a mixed batch use this adapter, bool `(batch,)`; None: all.
        """
        raise TypeError(f"{type(self).__name__} does not define compute_prefix(module, rows)")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the attention module with the prefix passed to its attention function."""
        module: Any = base.module
        implementation = vars(module)["config"]._attn_implementation
        if original_attention(implementation) not in SUPPORTED_ATTENTION:
            raise ModelError(
                f"{type(module).__name__} runs with attn_implementation={implementation!r}, which cannot take a prefix",
                " or ".join(map(repr, SUPPORTED_ATTENTION)),
                'from_pretrained(..., attn_implementation="sdpa")',
            )
        # The innermost prefix comes first, like virtual tokens. transformers forwards unknown keyword arguments.
        prefixes = ((self.compute_prefix(module, rows), rows), *kwargs.pop(PREFIX_KWARG, ()))
        return base(*args, **{PREFIX_KWARG: prefixes}, **kwargs)

    def forward_batch_rows(
        self, base: BaseForward, plain_base: BaseForward, rows: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the attention module with a prefix that only some rows attend to."""
        return self.forward_with_base(base, *args, rows=rows, **kwargs)

    def merge_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raise: keys and values are not weights."""
        raise MergeUnsupported(f"{type(self).__name__} adds keys and values, which do not change a weight")


class LearnedEmbeddings(AdapterModule):
    """Mixin for modules that learn `prompt_embeddings (n, width)`, as a parameter or as the output of a prompt encoder.

    A file always contains `prompt_embeddings`, which is all that PEFT reads and inference needs. With a prompt encoder,
    our files also contain the encoder's tensors (`prompt_encoder.…`), so that training can continue. Loaded from a file
    without them, the embeddings become a parameter.

    Args:
        site: the site.
        start: initial embeddings `(n, width)`, or the prompt encoder: a module that returns them when it is called.
    """

    def __init__(self, site: Site, start: Tensor | nn.Module) -> None:
        super().__init__()
        if isinstance(start, nn.Module):
            self.prompt_encoder: nn.Module | None = start.to(site.device, site.dtype)
            self.register_parameter("prompt_embeddings", None)
        else:
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(start.detach().to(site.device, site.dtype, copy=True))

    def get_embeddings(self) -> Tensor:
        """Return `prompt_embeddings (n, width)`."""
        return self.prompt_embeddings if self.prompt_encoder is None else self.prompt_encoder()

    def tensors(self) -> dict[str, Tensor]:
        """Return the embeddings, computed without dropout if there is an encoder, and the encoder's tensors."""
        if self.prompt_encoder is None:
            return super().tensors()
        with torch.no_grad(), evaluation_mode(self.prompt_encoder):
            return {"prompt_embeddings": self.get_embeddings(), **super().tensors()}

    def prepare_load(self, given: Mapping[str, Tensor], site: Site) -> None:
        """Replace the encoder by a parameter if the file contains only the embeddings."""
        if self.prompt_encoder is None or any(k.startswith("prompt_encoder.") for k in given):
            return
        embeddings = self.tensors()["prompt_embeddings"]
        if "prompt_embeddings" in given and given["prompt_embeddings"].shape == embeddings.shape:
            trains = any(p.requires_grad for p in self.parameters())
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(embeddings, requires_grad=trains)


def find_backbone_name(model: Any) -> str:
    """Return the name of the module that maps embeddings to hidden states; "" if it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return name if name in model._modules else ""


def tokenize_text(text: str, tokenizer: str, settings: dict[str, Any] | None) -> list[int]:
    """Return the token ids of a text, special tokens included, with the tokenizer of a name or folder.

    Raises:
        UsageError: the tokenizer does not exist.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, **(settings or {}))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"tokenizer_name_or_path {tokenizer!r} cannot be loaded: {str(e).splitlines()[0]}",
            "a folder with a tokenizer, or a Hub id that can be reached",
            "name the base's own folder; in a recipe, the model's name means the model's tokenizer",
        ) from None
    ids: list[int] = loaded(text)["input_ids"]
    return ids


@contextmanager
def disable_adapter_for_inference(model: Any) -> Iterator[Any]:
    """Run a model without its adapters, in evaluation mode and without gradients, inside the `with`."""
    has_adapters = hasattr(model, "disable_adapter") and hasattr(model, "peft_config")
    with torch.no_grad(), evaluation_mode(model), model.disable_adapter() if has_adapters else nullcontext():
        yield model


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the `with`, and restore each submodule's own mode after it."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training
