"""Make a model accept packed layouts: `model(..., slimtune_layout=layout)` inside `using_packed_attention(model)`.

transformers calls attention through a table of functions by name, and passes unknown keyword arguments of the model's
call on to it. This module registers a second name for "sdpa" and "eager", whose function reads the layout from the
keyword arguments and attends segment by segment (with flex attention on CUDA). Without a layout, both names do the
same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import ModelError
from ..foundation.device import get_real_or_simulated_device_type, is_device_simulated
from .packed_attention import (
    MAX_SEGMENT_TOKENS,
    attend_by_segment_on_cpu,
    get_flex_block_mask,
    run_compiled_flex_attention,
    should_use_flex_attention,
    simulate_flex_attention_memory,
)
from .packed_layout import PackedLayout

LAYOUT_KWARG = "slimtune_layout"
SUPPORTED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that can run packed layouts."""
_NAME_PREFIX = "slimtune_"
LAYOUT_FAMILIES = frozenset([
    "apertus", "arcee", "aria_text", "axk1", "bitnet", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm",
    "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4",
    "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "laguna", "llama",
    "mellum", "mimo_v2_flash", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "olmo",
    "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu",
])  # fmt: skip
"""Families (`model_type`) whose packed rows are exact by construction: all their attention goes through transformers'
interface, and positions enter by `position_ids` alone. `tests/attention/test_families.py` proves each in float64."""
POSITION_FAMILIES = frozenset(["falcon", "gpt_neox_japanese", "nemotron", "stablelm"])
"""Families with attention of their own, whose rows transformers' mask separates by `position_ids`; proven there, too.
They pack without shared prefixes."""


@contextmanager
def using_packed_attention(model: Any) -> Iterator[bool]:
    """Let a model accept packed layouts inside the `with`; calls without a layout work as before.

    Yields whether the model can (see `layout_unsupported_reason_or_empty`).
    """
    implementation = getattr(model.config, "_attn_implementation", None) or ""
    if implementation.startswith(_NAME_PREFIX) or layout_unsupported_reason_or_empty(model):
        yield implementation.startswith(_NAME_PREFIX)
        return
    model.set_attn_implementation(_NAME_PREFIX + implementation)
    try:
        yield True
    finally:
        model.set_attn_implementation(implementation)


def packing_unsupported_reason_or_empty(model: Any) -> str:
    """Return why packed rows are not known to be computed as if each were alone, "" if they are."""
    if model.config.model_type in POSITION_FAMILIES and not _foreign_code_reason(model):
        # ALiBi's biases are computed in bfloat16 from places in the whole sequence.
        return "its ALiBi biases depend on the place in the sequence" if getattr(model.config, "alibi", False) else ""
    return layout_unsupported_reason_or_empty(model)


def layout_unsupported_reason_or_empty(model: Any) -> str:
    """Return why a model cannot run packed layouts, "" if it can; reads only its class and config."""
    implementation = get_original_attention_name(getattr(model.config, "_attn_implementation", None))
    text = model.config.get_text_config()
    other_layers = find_layer_types_without_attention(text)
    if reason := _foreign_code_reason(model):
        return reason
    if other_layers or getattr(text, "attention_chunk_size", None):
        return f"it has layers without plain attention ({', '.join(other_layers) or 'chunked'})"
    if not has_attention_interface(model):
        return f"the attention of a {type(model).__name__} does not use transformers' attention interface"
    if model.config.model_type not in LAYOUT_FAMILIES:
        return f"packed rows of the family {model.config.model_type!r} are not proven to stay apart"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention is not causal"
    if implementation not in SUPPORTED_ATTENTION:
        return f"attn_implementation is {implementation!r}, not 'sdpa' or 'eager'"
    return ""


def find_layer_types_without_attention(text_config: Any) -> list[str]:
    """Return the types of a text model's layers that have no keys and values, sorted."""
    types = (getattr(text_config, name, None) or () for name in ("layer_types", "layers_block_type"))
    return sorted(set().union(*types) - {"full_attention", "sliding_attention", "attention"})


def has_attention_interface(model: Any) -> bool:
    """Return whether a model's attention calls transformers' attention function, and passes keyword arguments to it."""
    return bool(getattr(model, "_supports_attention_backend", False))


def _foreign_code_reason(model: Any) -> str:
    # Adapters, FSDP and peft put classes of their own above the model's.
    own = ("slimtune", "torch", "peft")
    code = next(c.__module__ for c in type(model).__mro__ if c.__module__.partition(".")[0] not in own)
    known = code.startswith("transformers.")
    return "" if known else f"the code of {type(model).__name__} is not transformers' own"


def get_original_attention_name(implementation: Any) -> Any:
    """Return the attention implementation that the user chose, inside `using_packed_attention` too."""
    return implementation.removeprefix(_NAME_PREFIX) if isinstance(implementation, str) else implementation


def get_attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """Return an attention function by name; each model's own file defines its eager one."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    files = (vars(sys.modules[c.__module__]) for c in type(module).__mro__)
    return next(f["eager_attention_forward"] for f in files if "eager_attention_forward" in f)


def make_placeholder_mask(device: torch.device) -> Tensor:
    """Return a placeholder mask for calls with a layout: transformers passes a 4-D mask on unchanged."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function with packed layouts: `query (1, heads, tokens, size)`, keys and values `(1, kv heads, …)`.

    Without a layout among `kwargs`, the attention that the user chose, `name` ("sdpa" or "eager"), runs with the mask.
    """
    layout: PackedLayout | None = kwargs.pop(LAYOUT_KWARG, None)
    if layout is None:
        return get_attention_function(module, name)(module, query, key, value, attention_mask, **kwargs)
    _check_call(module, layout, query, key, kwargs)
    return _attend_packed(name, module, query, key, value, layout, kwargs), None


@torch.compiler.disable  # compiled with the model, it would be recompiled for every layout
def _attend_packed(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    kwargs: dict[str, Any],
) -> Tensor:
    """Return the attention output `(1, tokens, heads, size)`."""
    window, scaling, dropout = kwargs.get("sliding_window") or None, kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    plain_sdpa = implementation == "sdpa" and kwargs.get("softcap") is None
    causal = len(layout.lengths) == 1 and not layout.num_prefix_keys and (window is None or window >= layout.total)
    long_row = causal and layout.total > MAX_SEGMENT_TOKENS
    if plain_sdpa and not long_row and should_use_flex_attention(query, key, dropout):
        if is_device_simulated():
            out = simulate_flex_attention_memory(query, key, value, layout.count_pairs(window))
        else:
            mask = get_flex_block_mask(layout, window, query.device)
            out = run_compiled_flex_attention(query, key, value, mask, scaling)
        return out.transpose(1, 2).contiguous()
    # The CPU kernel supports neither dropout nor values of another size than the queries.
    same_size = query.shape[-1] == value.shape[-1]
    if plain_sdpa and get_real_or_simulated_device_type(query.device) == "cpu" and not dropout and same_size:
        return attend_by_segment_on_cpu(query, key, value, layout, window, scaling)

    # Otherwise: the model's own attention function once per segment, over the keys of the segment's path.
    run = get_attention_function(module, implementation)
    keys, values = (t.split((layout.num_prefix_keys, *layout.lengths), dim=2) for t in (key, value))
    outputs = []
    for i, q in enumerate(query.split(layout.lengths, dim=2)):
        path = [*([0] if layout.num_prefix_keys else []), *(a + 1 for a in layout.ancestors(i))]
        k, v = (torch.cat([t[s] for s in path], dim=2) if len(path) > 1 else t[path[0]] for t in (keys, values))
        mask = layout.segment_bias(i, window, query.dtype, query.device)
        if mask is None and implementation == "eager":
            n = q.shape[2]
            above = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            mask = q.new_zeros(n, n).masked_fill(above, torch.finfo(q.dtype).min)[None, None]
        outputs.append(run(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _check_call(module: Any, layout: PackedLayout, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    name, hint = type(module).__name__, "--set train.packing=false"
    if query.shape[0] != 1 or query.shape[2] != layout.total or key.shape[2] != layout.total + layout.num_prefix_keys:
        raise ModelError(
            f"{name} attends from {query.shape[0]} rows of {query.shape[2]} tokens to {key.shape[2]} keys, but the "
            f"layout has one row of {layout.total}",
            "a call without a cache",
            hint,
        )
    if getattr(module.config, "sliding_window", None) and "sliding_window" not in kwargs:
        raise ModelError(f"{name} does not pass on its window: rows cannot share one sequence", hint=hint)
    if kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise ModelError(f"{name} is not causal, or adds a bias by position: rows cannot share one sequence", hint=hint)


for _implementation in SUPPORTED_ATTENTION:
    ALL_ATTENTION_FUNCTIONS.register(_NAME_PREFIX + _implementation, partial(_attend, _implementation))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME_PREFIX + _implementation, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])
