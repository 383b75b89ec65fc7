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
from .base import AdapterModule, BaseForward, Site, SiteKind
from .config import PeftConfig
from .config_fields import setting
from .virtual_tokens import BackboneCall


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
        super().check()
        self.require(self.num_virtual_tokens is not None, "num_virtual_tokens", "an integer, at least 1")
        decoder = self.num_transformer_submodules in (None, 1)
        self.require(decoder, "num_transformer_submodules", "1: a decoder (2 is an encoder and a decoder)")

    def fill_from_model(self, model: Any) -> None:
        require_decoder(model)
        text = model.config.get_text_config()
        self.num_transformer_submodules = self.num_transformer_submodules or 1
        self.num_layers = self.num_layers or text.num_hidden_layers
        self.num_attention_heads = self.num_attention_heads or text.num_attention_heads
        self.token_dim = self.token_dim or text.hidden_size

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        return {find_backbone_name(model): "model"}

    def file_key(self, key: str) -> str:
        """Return PEFT's keys: learned tensors without a module name, modules trained in full with a shorter prefix."""
        learned = re.search(r"\.(prompt_embeddings|prompt_encoder\..+)$", key)
        return learned[1] if learned else key.replace("base_model.model.", "base_model.", 1)


class PromptModule(AdapterModule):
    """Adapter module at the backbone that adds virtual tokens; a method defines `virtual_embeddings`."""

    takes_row_mask = True
    is_tuner_layer = False

    def virtual_embeddings(self) -> Tensor:
        """Return the embeddings of the virtual tokens `(n, hidden)`."""
        raise TypeError(f"{type(self).__name__} does not define virtual_embeddings()")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with the virtual tokens in front, and return the hidden states of the other tokens."""
        return BackboneCall(base.module, args, kwargs).run_with_virtual_tokens(
            base, self, self.virtual_embeddings(), rows
        )


class PositionShift(AdapterModule):
    """Adapter module at the backbone that starts the tokens' positions at `n`, for prefixes that take the first `n`."""

    takes_row_mask = True
    is_tuner_layer = False

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
        return call.format_output(call.run_and_mark_cache(base, self, 0))


class AttentionModule(AdapterModule):
    """Adds learned keys and values at a layer's attention; a method defines `compute_prefix_key_values`."""

    uses_attention_prefix = True
    takes_row_mask = True
    is_tuner_layer = False

    def compute_prefix_key_values(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return the learned keys and values of this layer, whose frozen attention is `module`."""
        raise TypeError(f"{type(self).__name__} does not define compute_prefix_key_values(module, rows)")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the attention module with the prefix passed to its attention function."""
        module: Any = base.module
        implementation = vars(module)["config"]._attn_implementation
        if original_attention(implementation) not in SUPPORTED_ATTENTION:
            message = (
                f"{type(module).__name__} runs with attn_implementation={implementation!r}, which cannot take a prefix"
            )
            raise ModelError(message, " or ".join(map(repr, SUPPORTED_ATTENTION)), 'attn_implementation="sdpa"')
        # The innermost prefix comes first, like virtual tokens. transformers forwards unknown keyword arguments.
        prefixes = ((self.compute_prefix_key_values(module, rows), rows), *kwargs.pop(PREFIX_KWARG, ()))
        return base(*args, **{PREFIX_KWARG: prefixes}, **kwargs)


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

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: Site) -> None:
        """Replace the encoder by a parameter if the file contains only the embeddings."""
        if self.prompt_encoder is None or any(k.startswith("prompt_encoder.") for k in state_dict):
            return
        embeddings = self.tensors()["prompt_embeddings"]
        if "prompt_embeddings" in state_dict and state_dict["prompt_embeddings"].shape == embeddings.shape:
            trains = any(p.requires_grad for p in self.parameters())
            self.prompt_encoder = None
            self.prompt_embeddings = nn.Parameter(embeddings, requires_grad=trains)


def find_backbone_name(model: Any) -> str:
    """Return the name of the module that maps embeddings to hidden states; "" if it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return name if name in model._modules else ""


def tokenize_text(text: str, tokenizer: str, settings: dict[str, Any] | None) -> list[int]:
    """Return the token ids of a text, special tokens included, with the tokenizer of a name or folder."""
    try:
        ids: list[int] = AutoTokenizer.from_pretrained(tokenizer, **(settings or {}))(text)["input_ids"]
    except (OSError, ValueError) as e:
        message = f"tokenizer_name_or_path {tokenizer!r} cannot be loaded: {str(e).splitlines()[0]}"
        hint = "name the base's own folder; in a recipe, the model's name means the model's tokenizer"
        raise UsageError(message, "a folder with a tokenizer, or a Hub id that can be reached", hint) from None
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
