"""Write GGUF files: a LoRA that llama.cpp and Ollama add to a base, or a whole model.

**Adapter.** y = W x + (alpha / r) · B (A x): tensors `blk.0.attn_q.weight.lora_a` `(r, in)` and `….lora_b` `(out, r)`.
llama.cpp has one alpha for the whole file and divides it by each tensor's rank. If the adapter's layers need different
alphas (rank and alpha patterns), the rest of the scale is multiplied into B. Every method that is low-rank at this
moment can be written. Format: llama.cpp, `src/llama-adapter.cpp` and `convert_lora_to_gguf.py`.

**Whole model.** If the base was a GGUF, its metadata and tokenizer are copied and its tensors replaced. Any other base
is converted by llama.cpp's `convert_hf_to_gguf.py`, which knows how each tokenizer splits text. Both write
`PRECISIONS`; other precisions (Q4_K_M, …) are made by llama.cpp's quantizer (`llama_cpp_tools.py`).

**A new architecture** is one line in `ARCHITECTURES`. Tensor names are gguf's own (`TensorNameMap`). What they do not
say is where llama.cpp's converter changes the weights (`undo_permute` in `conversion/`): Hugging Face rotates halves
(x₀ with x_{d/2}), llama.cpp's Llama rotates neighbours (x₀ with x₁), so row (h, i, j) of q and k, i < 2 and j < d/2,
becomes row (h, j, i). GPT-NeoX has query, key and value of a head together, llama.cpp all queries first: row (h, i, j),
i < 3 and j < d, becomes row (i, h, j).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, ModelError, UsageError, format_names, suggest
from ..extras.gguf_loading import import_gguf, open_gguf_reader
from .export_support import Factors, get_export_support_flags, split_low_rank_and_other_changes
from .gguf_format import GgufExportFacts
from .llama_cpp_tools import PRECISIONS

ADAPTER_DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "f16": torch.float16}


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp stores one architecture; layers are given by their last names."""

    name: str  # in gguf
    permuted: dict[str, str] = field(default_factory=dict)  # output rows permuted, by the config's number of heads
    norm_shift: float = 0.0  # added to norms' weights: Gemma multiplies by 1 + w, llama.cpp by what the file says
    transposed: tuple[str, ...] = ()  # weight stored as `(in, out)`
    interleaved: bool = False  # experts' gate and up are every other row, not one after the other
    qkv_by_head: str = ""  # fused layer whose rows are a head's query, key and value, then the next head's


_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
ARCHITECTURES = {
    "llama": GgufArchitecture("llama", _ROTATED),  # Llama 1 to 3, SmolLM, TinyLlama
    "mistral": GgufArchitecture("llama", _ROTATED),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "qwen3_moe": GgufArchitecture("qwen3moe"),
    "mixtral": GgufArchitecture("llama", _ROTATED),
    "olmoe": GgufArchitecture("olmoe"),
    "gpt_oss": GgufArchitecture("gpt-oss", transposed=("gate_up_proj", "down_proj"), interleaved=True),
    "gemma": GgufArchitecture("gemma", norm_shift=1.0),
    "gemma2": GgufArchitecture("gemma2", norm_shift=1.0),
    "gemma3_text": GgufArchitecture("gemma3", norm_shift=1.0),
    "gemma3": GgufArchitecture("gemma3", norm_shift=1.0),  # with a vision tower, which has no names
    "phi3": GgufArchitecture("phi3"),
    "smollm3": GgufArchitecture("smollm3", _ROTATED),
    "granite": GgufArchitecture("granite", _ROTATED),
    "olmo": GgufArchitecture("olmo", _ROTATED),
    "olmo2": GgufArchitecture("olmo2"),
    "phi": GgufArchitecture("phi2"),
    "cohere2": GgufArchitecture("cohere2"),
    "lfm2": GgufArchitecture("lfm2"),
    "gpt_neox": GgufArchitecture("gptneox", qkv_by_head="query_key_value"),
    "gpt2": GgufArchitecture("gpt2", transposed=("c_attn", "c_proj", "c_fc")),
}
"""By `model_type` in Hugging Face's config."""


def require_gguf_architecture_spec(config: Any) -> GgufArchitecture:
    """Return how llama.cpp stores a model's architecture, or raise UsageError if it is not in the table."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UsageError(
            f"cannot write a {kind!r} model as GGUF: how llama.cpp names and orders its weights is not known"
            f"{suggest(kind, ARCHITECTURES)}",
            f"one of {format_names(ARCHITECTURES)}",
            "merge it (slimtune merge RUN --out FOLDER) and give FOLDER to llama.cpp's convert_hf_to_gguf.py, which "
            "knows more architectures (--merged does both if the base is not a GGUF); or serve it by vLLM: --to vllm",
            code="gguf-architecture",
        )
    return ARCHITECTURES[kind]


def make_gguf_module_name_mapper(config: Any) -> Callable[[str], str | None]:
    """Return gguf's names of a model's modules: `("model.layers.0.mlp.up_proj")` is "blk.0.ffn_up"; None: no name."""
    name, gguf = require_gguf_architecture_spec(config).name, import_gguf()
    architecture = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, config.get_text_config().num_hidden_layers)
    return lambda module: names.get_name(module.replace("model.language_model.", "model."))


def convert_to_llama_cpp_tensors(name: str, weight: Tensor, config: Any, gguf_name_mapper: Any) -> dict[str, Tensor]:
    """Return a parameter as llama.cpp stores it, by name there, such as `blk.0.attn_q.weight`; {}: it has no name.

    Stacked experts `(experts, …)` are stored as the tensors gate, up and down.
    """
    architecture, (module, _, leaf) = require_gguf_architecture_spec(config), name.rpartition(".")
    if leaf not in ("weight", "bias"):  # a parameter whose name says what it is, such as experts.gate_up_proj_bias
        kind, owner = ("bias", name.removesuffix("_bias")) if leaf.endswith("_bias") else ("weight", name)
        if kind == "weight" and leaf in architecture.transposed:
            weight = weight.mT
        parts = split_gate_up_by_projection_name(owner, weight, config)
        found = {gguf_name_mapper(part): tensor for part, tensor in parts.items()}
        return {} if None in found else {f"{part}.{kind}": tensor for part, tensor in found.items()}
    if (module_name := gguf_name_mapper(module)) is None:
        return {}
    if leaf == "weight" and module.rpartition(".")[2] in architecture.transposed:
        weight = weight.t()
    if leaf == "weight" and weight.dim() == 3:  # a depthwise convolution (channels, 1, kernel)
        weight = weight.squeeze(1)
    if architecture.norm_shift and weight.dim() == 1 and module.endswith("norm"):
        weight = weight + architecture.norm_shift
    return {f"{module_name}.{leaf}": reorder_rows_for_llama_cpp(weight, module, config)}


def split_gate_up_by_projection_name(name: str, rows: Tensor, config: Any) -> dict[str, Tensor]:
    """Return experts' output rows `(experts, out, …)`, of a weight or a LoRA's B, by the name of each projection."""
    module, _, leaf = name.rpartition(".")
    if leaf != "gate_up_proj":
        return {name: rows}
    gate, up = (
        (rows[:, ::2], rows[:, 1::2]) if require_gguf_architecture_spec(config).interleaved else rows.chunk(2, dim=1)
    )
    return {f"{module}.gate_proj": gate, f"{module}.up_proj": up}


def reorder_rows_for_llama_cpp(rows: Tensor, module: str, config: Any) -> Tensor:
    """Return the output rows of a linear layer, of its weight or a LoRA's B `(out, …)`, in llama.cpp's order."""
    architecture, text, last = (
        require_gguf_architecture_spec(config),
        config.get_text_config(),
        module.rpartition(".")[2],
    )
    if last in architecture.permuted:
        halves = rows.reshape(getattr(text, architecture.permuted[last]), 2, -1, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)
    if last == architecture.qkv_by_head:
        return rows.reshape(text.num_attention_heads, 3, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
    return rows


# --- adapter ---------------------------------------------------------------------------------------------------------


def write_adapter_gguf(
    file: Path, model: Any, adapter_name: str = "default", precision: str = "f32"
) -> GgufExportFacts:
    """Write an adapter as GGUF in "f32" or "f16".

    AdapterError means that a value is NaN or Inf, or too large for the precision.
    """
    gguf, architecture = import_gguf(), require_gguf_architecture_spec(model.config)
    names, layers = make_gguf_module_name_mapper(model.config), get_lora_factors_and_scales(model, adapter_name)
    layers = {
        part: (A, rows, scale)
        for module, (A, B, scale) in layers.items()
        for part, rows in (
            split_gate_up_by_projection_name(module, B, model.config) if B.dim() == 3 else {module: B}
        ).items()
    }
    alphas = {module: scale * A.shape[-2] for module, (A, _, scale) in layers.items()}
    alpha = max(sorted(set(alphas.values())), key=list(alphas.values()).count)  # the most common one
    writer = gguf.GGUFWriter(str(file), architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType[PRECISIONS[precision]])
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (A, B, _) in layers.items():
        name = names(module)
        if name is None:
            raise UsageError(
                f"{module} has no name in GGUF for the architecture {architecture.name}",
                "adapters on the linear layers of attention and MLP, and on experts",
                "export it merged: --merged, or slimtune merge",
            )
        B = B.to(torch.promote_types(B.dtype, torch.float32))
        if alphas[module] != alpha:
            B = B * (alphas[module] / alpha)
        B = reorder_rows_for_llama_cpp(B, module, model.config)
        for part, tensor in (("lora_a", A), ("lora_b", B)):
            writer.add_tensor(f"{name}.weight.{part}", _to_finite_array(tensor, module, precision))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ranks = sorted({A.shape[-2] for A, _, _ in layers.values()})
    return GgufExportFacts(
        architecture=architecture.name,
        alpha=alpha,
        ranks=ranks,
        tensors=2 * len(layers),
        bytes=file.stat().st_size,
        precision=precision,
    )


def get_lora_factors_and_scales(model: Any, adapter_name: str = "default") -> dict[str, Factors]:
    """Return A `(r, in)`, B `(out, r)` and the scale of an adapter's update of each linear layer, in the model's order.

    Those of a stacked weight of experts are `(experts, r, in)` and `(experts, out, r)`, under the parameter's name.

    UsageError names what else the adapter does, and the alternatives.
    """
    layers, other = split_low_rank_and_other_changes(model, adapter_name)
    if layers and not other:
        return {name: (A.detach(), B.detach(), scale) for name, (A, B, scale) in layers.items()}
    config = model.peft_config[adapter_name]
    hint = "export it merged: --merged, or slimtune merge; or turn it into a LoRA: --convert-to-lora RANK"
    if not get_export_support_flags(model, adapter_name).merged:
        hint = f"{config.name} cannot be merged either: use it from slimtune (generate, chat) or Python"
    raise UsageError(
        f"the {config.name} adapter is not a LoRA of linear layers only: {format_names(other, 4) or 'it changes none'}",
        "scale · B A on linear layers and experts: llama.cpp adds nothing else to a base",
        hint,
        code="merge-differs",
    )


def _to_finite_array(tensor: Tensor, module: str, precision: str) -> Any:
    rounded = tensor.detach().cpu().to(ADAPTER_DTYPES[precision])
    if not torch.isfinite(tensor).all():
        raise AdapterError(
            f"the adapter at {module} contains NaN or Inf", "finite values", "an older checkpoint of the run"
        )
    if not torch.isfinite(rounded).all():
        largest = f"values up to {tensor.abs().max().item():.3g}, too large for {precision}"
        limit = torch.finfo(rounded.dtype).max
        raise AdapterError(
            f"the adapter at {module} contains {largest}", f"values up to {limit:.3g}", "--precision f32"
        )
    return rounded.contiguous().numpy()


# --- whole model -----------------------------------------------------------------------------------------------------


def write_gguf_from_template(
    template: Path, model: Any, file: Path, precision: str = "f16", chat_template: Any = None
) -> None:
    """Write a model as the GGUF its base came from: metadata and tokenizer from there, tensors from the model.

    A `chat_template` of text replaces the file's.

    One tensor is in memory at a time, beside the model's own. Vectors stay in f32. An adapted model is written without
    its adapters, except those merged into it.
    """
    gguf, architecture, names = (
        import_gguf(),
        require_gguf_architecture_spec(model.config),
        make_gguf_module_name_mapper(model.config),
    )
    reader = open_gguf_reader(template)
    base_tensors = {t.name: t for t in reader.tensors}
    parameters: dict[str, tuple[str, Tensor]] = {}
    unknown = []
    for name, parameter in model.named_parameters():
        if re.search(r"(^|\.)(adapters|modules_to_save)\.", name):
            continue
        # On meta: only the names are needed here, and reordering rows would copy them.
        found = convert_to_llama_cpp_tensors(name, parameter.detach().to("meta"), model.config, names)
        parameters |= dict.fromkeys(found, (name, parameter))
        unknown += [] if found else [name]
    missing = [n for n in base_tensors if n not in parameters and not n.startswith("rope")]
    if missing or unknown:
        raise ModelError(
            f"the model and {template.name} have different tensors: {format_names([*missing, *unknown], 4)}",
            f"a GGUF of the architecture {architecture.name}, and the model that was loaded from it",
        )
    tokens, rows = reader.fields.get(gguf.Keys.Tokenizer.LIST), model.get_input_embeddings().weight.shape[0]
    if tokens is not None and len(tokens.data) != rows:
        raise ModelError(
            f"the model embeds {rows} tokens, the tokenizer in {template.name} has {len(tokens.data)}",
            "the tokens of the base: a GGUF's tokenizer is copied unchanged",
            "slimtune merge, and llama.cpp's converter",
        )
    writer = gguf.GGUFWriter(str(file), architecture.name)
    skipped = [gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, "general.alignment"]
    if isinstance(chat_template, str):
        skipped.append(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
        writer.add_chat_template(chat_template)
    for f in reader.fields.values():
        if f.name not in skipped and not f.name.startswith(("GGUF.", "split.")):
            item_type = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(f.name, f.contents(), f.types[0], item_type)
    writer.add_file_type(gguf.LlamaFileType[PRECISIONS[precision]])

    def encode(name: str) -> tuple[Any, Any]:
        if name not in parameters:
            return base_tensors[name].data, base_tensors[name].tensor_type
        own_name, parameter = parameters[name]
        tensor = convert_to_llama_cpp_tensors(own_name, parameter.detach(), model.config, names)[name]
        values = tensor.to(torch.float32).cpu().contiguous().numpy()
        kind = gguf.GGMLQuantizationType[precision.upper() if values.ndim > 1 else "F32"]
        if values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16  # a row is not a whole number of blocks
        return gguf.quants.quantize(values, kind), kind

    order = [*base_tensors, *(n for n in parameters if n not in base_tensors)]  # new: a head that is not tied any more
    for name in order:
        data, kind = encode(name)
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:
        writer.write_tensor_data(encode(name)[0])
    writer.close()
