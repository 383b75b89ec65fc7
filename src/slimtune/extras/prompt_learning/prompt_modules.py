"""Base classes of prompt learning: virtual tokens before the sequence, learned keys and values in the attention.

    prompt tuning, P-tuning         [v_1 … v_n, x_1 … x_T] → backbone → hidden of x_1 … x_T `BackboneVirtualTokenModule`
    prefix tuning, LLaMA-Adapter    n learned keys and values in the attention of every layer `PrefixAttentionModule`

Virtual tokens enter with the backbone's input and are removed from its output: everything above it (logits, labels,
losses, `generate`) has T positions, as without them. `virtual_tokens.py` changes positions, masks and cache:

    left padding      [pad, v, x]: right before the first token, so that sliding windows cover the right tokens
    packed sequence   [v, row, row, …]: one v for all rows, since nothing before v changes it; the mask shows each row v
                      and itself, and sliding windows count positions
    cache             v is stored like tokens; a mark on the cache records it, and later steps add no v
    mixed batch       v stands before every row, and is masked out in rows that use another adapter

An encoder reads [v, x] with v before padding, as in PEFT. Where a classifier pools its first position, and below a
decoder that attends to the encoder's output, the virtual positions stay in the output.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.auto import modeling_auto

from ...core.adapters.adapter_module import AdapterModule, AdapterSite, BaseForward
from ...core.adapters.architectures import get_text_config
from ...core.attention.attention_functions import SUPPORTED_ATTENTION, get_original_attention_name
from ...core.attention.packed_layout import RowMask
from ...errors import ModelError, UsageError, format_names
from .learned_prefix import OTHER_METHODS, PREFIX_KWARG, AttentionPrefix, copy_config_with_prefix_attention
from .virtual_tokens import BackboneCall

CACHES = frozenset(["cache", "past_key_values"])
"""The names that a backbone's cache of keys and values can have as an argument."""


class BackboneAdapterModule(AdapterModule):
    """Adapter module at a backbone; it records that it was called, which `require_reached` checks.

    For the task FEATURE_EXTRACTION, PEFT ignores token types.
    """

    takes_row_mask = True
    is_tuner_layer = False

    def __init__(self, task_type: str | None = None) -> None:
        super().__init__()
        self.ignores_token_types = task_type == "FEATURE_EXTRACTION"
        self.calls: list[int] = []  # a list, so that the replicas of DataParallel share it

    def start_call(self, base: BaseForward, args: tuple, kwargs: dict[str, Any]) -> BackboneCall:
        """Return the call of the backbone, and record it."""
        if not self.calls:
            self.calls.append(1)
        call = BackboneCall(base.module, args, kwargs)
        if self.ignores_token_types and call.inputs.pop("token_type_ids", None) is not None:
            warnings.warn("token_type_ids are ignored, as PEFT does for FEATURE_EXTRACTION", stacklevel=2)
        return call


class BackboneVirtualTokenModule(BackboneAdapterModule):
    """Adapter module at the backbone that adds virtual tokens; a method defines `virtual_embeddings`.

    Args:
        site: the site.
        task_type: the adapter's task.
    """

    def __init__(self, site: AdapterSite, task_type: str | None) -> None:
        super().__init__(task_type)
        found = require_backbone_names(site.model)
        self.causal = found.causal
        pooled = not found.causal and _pools_first_position(site.model, task_type)
        self.keeps_positions = found.decoder is not None or pooled

    def virtual_embeddings(self) -> Tensor:
        """Return the embeddings of the virtual tokens `(n, hidden)`."""
        raise TypeError(f"{type(self).__name__} does not define virtual_embeddings()")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with the virtual tokens in front, and return the hidden states of the other tokens."""
        call = self.start_call(base, args, kwargs)
        if self.causal:
            return call.run_with_virtual_tokens(base, self, self.virtual_embeddings(), rows)
        if rows is not None:
            message = "adapter_names is given, but the rows of an encoder cannot have different virtual tokens"
            raise UsageError(message, hint="set_adapter, and one call for each adapter")
        return call.run_encoder(base, self.virtual_embeddings(), keep=self.keeps_positions)


class VirtualTokenCrossAttentionMask(BackboneAdapterModule):
    """Adapter module at a decoder that lets it attend to the `n` virtual tokens in the encoder's output."""

    no_op_values: ClassVar = {}

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the decoder with the encoder's mask extended."""
        call = self.start_call(base, args, kwargs)
        states, mask = (call.inputs.get(f"encoder_{name}") for name in ("hidden_states", "attention_mask"))
        if states is not None and mask is not None and mask.shape[-1] != states.shape[1]:
            if mask.dim() != 2 or mask.shape[1] + self.n > states.shape[1]:
                message = f"the encoder's output has {states.shape[1]} positions, its mask {mask.shape[-1]}"
                raise UsageError(message, f"a mask (batch, tokens) and {self.n} positions more in the output")
            mask = torch.cat([mask.new_ones(len(mask), self.n), mask], dim=1)
            call.inputs["encoder_attention_mask"] = mask
        return base(**call.get_caller_inputs())


class PrefixPositionShift(BackboneAdapterModule):
    """Adapter module at the backbone that starts the tokens' positions at `n`, for prefixes that take the first `n`."""

    @property
    def n(self) -> int:
        """Number of positions that the prefix takes."""
        raise TypeError(f"{type(self).__name__} does not define n")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the backbone with all positions increased by `n`."""
        call = self.start_call(base, args, kwargs)
        call.has_cached_tokens(self, 0)
        positions = call.get_position_ids()
        call.inputs["position_ids"] = positions + (self.n if rows is None else self.n * rows[:, None])
        return call.format_output(call.run_and_mark_cache(base, self, 0))


class PrefixAttentionModule(AdapterModule):
    """Adds learned keys and values at a layer's attention; a method defines `compute_prefix_key_values`."""

    takes_row_mask = True
    is_tuner_layer = False

    def make_base_config(self, module: nn.Module) -> Any:
        return copy_config_with_prefix_attention(module)

    def compute_prefix_key_values(self, module: nn.Module, rows: RowMask) -> AttentionPrefix:
        """Return the learned keys and values of this layer, whose frozen attention is `module`."""
        raise TypeError(f"{type(self).__name__} does not define compute_prefix_key_values(module, rows)")

    def forward_with_base(self, base: BaseForward, *args: Any, rows: RowMask = None, **kwargs: Any) -> Any:
        """Run the attention module with the prefix passed to its attention function."""
        module: Any = base.module
        implementation = vars(module)["config"]._attn_implementation
        if get_original_attention_name(implementation) not in SUPPORTED_ATTENTION:
            message = (
                f"{type(module).__name__} runs with attn_implementation={implementation!r}, which cannot take a prefix"
            )
            raise ModelError(message, " or ".join(map(repr, SUPPORTED_ATTENTION)), 'attn_implementation="sdpa"')
        # The innermost prefix comes first, like virtual tokens. transformers forwards unknown keyword arguments, and
        # the attention function empties the list.
        prefixes = kwargs.pop(PREFIX_KWARG, [])
        prefixes.insert(0, (self.compute_prefix_key_values(module, rows), rows))
        out = base(*args, **{PREFIX_KWARG: prefixes}, **kwargs)
        if prefixes:
            message = f"{type(module).__name__} does not call transformers' attention function: the prefix did nothing"
            raise ModelError(message, "a model whose attention uses transformers' interface", OTHER_METHODS)
        return out


class LearnedPromptEmbeddingsMixin(AdapterModule):
    """Mixin for modules that learn `prompt_embeddings (n, width)`, as a table or as the output of a prompt encoder.

    Their strength is the share of the way from where training started: no prompt changes nothing.

    A file always contains `prompt_embeddings`, which is all that PEFT reads and inference needs. With a prompt encoder,
    our files also contain the encoder's tensors (`prompt_encoder.…`), so that training can continue. Loaded from a file
    without them, the embeddings become a table.

    Args:
        site: the site.
        start_or_encoder: initial embeddings `(n, width)`, or the prompt encoder, which returns them when called.
        more: arguments of the class after it.
    """

    def __init__(self, site: AdapterSite, start_or_encoder: Tensor | nn.Module, *more: Any) -> None:
        super().__init__(*more)
        encoder = (
            start_or_encoder if isinstance(start_or_encoder, nn.Module) else PromptEmbeddingTable(start_or_encoder)
        )
        self.prompt_encoder = encoder.to(site.device, site.dtype)
        # On meta no start has values, and a plan counts that of a run.
        is_start = not site.skip_init or site.device.type == "meta"
        self.register_buffer("start", self.compute_embeddings() if is_start else None, persistent=False)

    def get_embeddings(self) -> Tensor:
        """Return `prompt_embeddings (n, width)`."""
        return self.prompt_encoder()

    def get_prompt(self, batch_size: int) -> Any:
        """Return what PEFT's `get_prompt` returns: here, the embeddings `(batch, n, width)`."""
        return self.get_embeddings().repeat(batch_size, 1, 1)

    @torch.no_grad()
    def compute_embeddings(self) -> Tensor:
        """Return a copy of the embeddings, without the dropout that an encoder can have."""
        with _evaluation_mode(self.prompt_encoder):
            return self.get_embeddings().clone()

    def embed_tokens(self, model: Any, ids: Sequence[int]) -> Tensor:
        """Return the embeddings `(n, width)` with which the adapted model answers as after these tokens."""
        with disable_adapter_in_eval_no_grad(model):
            return model.get_input_embeddings()(torch.tensor(ids, device=model.device))

    @torch.no_grad()
    def set_start(self, embeddings: Tensor) -> None:
        """Let training start at these embeddings `(n, width)`."""
        for name, values in self._find_parameters_with(embeddings).items():
            self.get_parameter(name).copy_(values)
        self.start = self.compute_embeddings()

    @property
    def has_strength(self) -> bool:
        """Return whether it is known where training started: not in an adapter that was loaded."""
        return self.start is not None

    def get_no_op_values(self, site: AdapterSite) -> dict[str, Tensor]:
        """Return the parameters with which the embeddings are those that training started at."""
        return self._find_parameters_with(self.start)

    @torch.no_grad()
    def _find_parameters_with(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return parameters by name that make the embeddings these: the table, or an encoder's last linear layer."""
        encoder: Any = self.prompt_encoder
        if isinstance(encoder, PromptEmbeddingTable):
            return {"prompt_encoder.embedding.weight": embeddings}
        with _evaluation_mode(encoder):
            inputs = encoder.compute_last_inputs().double()
        last = [name for name, module in self.named_modules() if isinstance(module, nn.Linear)][-1]
        bias = embeddings.double().mean(0)
        weight = (torch.linalg.pinv(inputs) @ (embeddings.double() - bias)).T
        return {f"{last}.weight": weight, f"{last}.bias": bias}

    def extra_state(self) -> dict[str, Tensor]:
        return {} if self.start is None else {"start": self.start}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        self.start = state["start"].to(self.get_embeddings())

    def tensors(self) -> dict[str, Tensor]:
        """Return the embeddings, computed without dropout if there is an encoder, and the encoder's tensors."""
        if isinstance(self.prompt_encoder, PromptEmbeddingTable):
            return {"prompt_embeddings": self.prompt_encoder.embedding.weight}
        return {"prompt_embeddings": self.compute_embeddings(), **super().tensors()}

    def before_load_state_dict(self, state_dict: Mapping[str, Tensor], site: AdapterSite) -> None:
        """Replace the encoder by a table if the file contains only the embeddings."""
        is_table = isinstance(self.prompt_encoder, PromptEmbeddingTable)
        if is_table or any(k.startswith("prompt_encoder.") for k in state_dict):
            return
        embeddings = self.tensors()["prompt_embeddings"]
        if "prompt_embeddings" in state_dict and state_dict["prompt_embeddings"].shape == embeddings.shape:
            trains = any(p.requires_grad for p in self.parameters())
            self.prompt_encoder = PromptEmbeddingTable(embeddings).requires_grad_(trains)


class PromptEmbeddingTable(nn.Module):
    """Learned embeddings `(n, width)` as one parameter, with PEFT's name: `embedding.weight`."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start.detach().clone(), freeze=False)

    def forward(self, columns: slice = slice(None)) -> Tensor:
        """Return `(n, width)`, or some of its columns."""
        return self.embedding.weight[:, columns]


class _Backbones(NamedTuple):
    """The modules of a model that read token embeddings.

    Args:
        reader: name of the module that reads `input_ids`; "" is the model itself.
        decoder: name of the decoder, in an encoder-decoder.
        causal: whether a position of `reader` sees only those before it.
    """

    reader: str
    decoder: str | None
    causal: bool


def require_backbone_names(model: Any) -> _Backbones:
    """Return the modules that map token embeddings to hidden states: the innermost that take ids, them and a mask.

    A head may call a part of its backbone: `OPTForCausalLM` calls `model.decoder`, past `model`. Since each module
    outside calls the innermost one, an adapter there is always reached.

    Raises:
        ModelError: there is no such module, or it is not clear which one reads the tokens.
    """
    name, expected = type(model).__name__, "a transformers model that takes inputs_embeds and an attention_mask"
    if getattr(model, "config", None) is None:
        raise ModelError(f"virtual tokens are not supported for a {name}", expected, OTHER_METHODS)
    takers = [n for n, m in model.named_modules() if _takes_embeddings(type(m).forward)]
    inner = [n for n in takers if not any(other != n and other.startswith(f"{n}." if n else "") for other in takers)]
    decoders = [n for n in inner if "decoder" in n.split(".")]
    encoders = [n for n in inner if n not in decoders]
    if getattr(model.config, "is_encoder_decoder", False):
        if len(decoders) == 1 and len(encoders) <= 1:
            return _Backbones(encoders[0] if encoders else decoders[0], decoders[0], causal=not encoders)
    elif len(inner) == 1:
        parameters = inspect.signature(type(model.get_submodule(inner[0])).forward).parameters
        attends = CACHES & set(parameters) and hasattr(get_text_config(model), "num_attention_heads")
        if "use_cache" in parameters and not attends:
            message = f"virtual tokens are not supported for a {name}, which does not cache keys and values"
            raise ModelError(message, "a model with attention in its layers", OTHER_METHODS)
        return _Backbones(inner[0], None, _is_causal(model))
    found = f"it has {format_names(inner)}" if inner else "no module of it takes them"
    raise ModelError(f"virtual tokens are not supported for a {name}: {found}", expected, OTHER_METHODS)


@cache
def _takes_embeddings(forward: Any) -> bool:
    # A vision encoder reads embeddings, but no token ids.
    return {"input_ids", "inputs_embeds", "attention_mask"} <= set(inspect.signature(forward).parameters)


def _is_causal(model: Any) -> bool:
    """Return whether a model of one part is a decoder."""
    config = model.config
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    causal = any(getattr(m, "is_causal", False) is True for m in model.modules())
    return causal or model.can_generate() or config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _pools_first_position(model: Any, task_type: str | None) -> bool:
    """Return whether a head above an encoder reads one position of each row, not each position."""
    names = {c.__name__ for c in type(model).__mro__}
    pooled = ("ForSequenceClassification", "ForMultipleChoice")
    return task_type == "SEQ_CLS" or any(n.endswith(pooled) for n in names)


def get_embedding_width(backbone: Any) -> int:
    """Return the size of a backbone's token embeddings, which may differ from its hidden size (ELECTRA)."""
    table = backbone.get_input_embeddings()
    return int(getattr(table, "embedding_dim", None) or table.weight.shape[-1])


def find_backbone_name(model: Any) -> str:
    """Return the name of the module that transformers calls the base model; "" if it is the model itself."""
    name = getattr(model, "base_model_prefix", "")
    return name if name in model._modules else ""


def tokenize_prompt_text(text: str, tokenizer_name: str, tokenizer_kwargs: dict[str, Any] | None) -> list[int]:
    """Return the token ids of a text, special tokens included, with the tokenizer of a name or folder."""
    try:
        ids: list[int] = AutoTokenizer.from_pretrained(tokenizer_name, **(tokenizer_kwargs or {}))(text)["input_ids"]
    except (OSError, ValueError) as e:
        message = f"tokenizer_name_or_path {tokenizer_name!r} cannot be loaded: {str(e).splitlines()[0]}"
        hint = "name the base's own folder; in a recipe, the model's name means the model's tokenizer"
        raise UsageError(message, "a folder with a tokenizer, or a Hub id that can be reached", hint) from None
    return ids


@contextmanager
def disable_adapter_in_eval_no_grad(model: Any) -> Iterator[Any]:
    """Run a model without its adapters, in evaluation mode and without gradients, inside the `with`."""
    has_adapters = hasattr(model, "disable_adapter") and hasattr(model, "peft_config")
    with torch.no_grad(), _evaluation_mode(model), model.disable_adapter() if has_adapters else nullcontext():
        yield model


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the `with`, and restore each submodule's own mode after it."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training
