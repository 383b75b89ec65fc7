"""How a GGUF in few bits rounds each matrix of a model: its type, and the values that the type's blocks can hold.

Training through the rounding (`methods/lora/rounded_lora.py`) and the export of what it trained read it from here.

**Types.** llama.cpp's quantizer chooses one for each tensor by name, shape and architecture. It is asked: for a file
that has the tensors' names and shapes, and no weights (the file is sparse), in a dry run.

**Values.** A block holds scale · level + offset. Scales and offsets are those that ggml finds for the *base's* matrix,
and stay fixed: the merged weight is rounded to the nearest of these values. So the search for scales, which takes
seconds for K-quants, runs once, and a weight stays where it is until its update reaches half a step.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core.kernels.linear_layers import get_dequantized_weight, get_in_and_out_features
from ..errors import ModelError, format_names
from ..extras.gguf_loading import import_gguf, open_gguf_reader
from ..methods.lora.rounded_lora import RoundedLinearLora
from .gguf import convert_to_llama_cpp_tensors, make_gguf_module_name_mapper, require_gguf_architecture_spec
from .gguf_blocks import BLOCK_FORMATS
from .llama_cpp_tools import find_quantized_types


class BlockGrid(NamedTuple):
    """The values that the blocks of a matrix can hold: scale · level + offset, by sub-block `(out, sub-blocks, 1)`."""

    scale: Tensor
    inverse_scale: Tensor
    offset: Tensor | None


class GgufRounding:
    """Rounds the weights of one layer to a type of GGUF.

    Args:
        type_name: ggml's name of the type.
    """

    def __init__(self, type_name: str) -> None:
        self.type_name, self.block_format = type_name, BLOCK_FORMATS[type_name]
        levels = self.block_format.levels.tolist()
        self._lowest, self._highest = levels[0], levels[-1]
        self._is_uniform = self._highest - self._lowest == len(levels) - 1
        if not self._is_uniform:
            halves = torch.arange(0.25, 256, 0.5, device="cpu") - 128  # the middle of each interval of a half
            levels_apart = torch.tensor(levels, device="cpu")
            self._quant_by_half = torch.bucketize(halves, (levels_apart[1:] + levels_apart[:-1]) / 2).float()
        self._grid: BlockGrid | None = None

    def round(self, merged: Tensor, base: Tensor) -> Tensor:
        """Return a merged weight `(out, in)` in fp32, each value the nearest that the blocks of `base` can hold."""
        grid = self._get_grid(base)
        levels = self._find_nearest_quants(merged, grid)
        if self._is_uniform:
            levels.add_(self._lowest)
        elif _has_values(base):
            by_quant = self.block_format.levels.to(base.device)
            levels = by_quant.index_select(0, levels.int().flatten()).view_as(levels)
        rounded = levels.mul_(grid.scale)
        return (rounded if grid.offset is None else rounded.add_(grid.offset)).view_as(merged)

    def make_blocks(self, merged: Tensor, base: Tensor) -> Tensor:
        """Return the bytes of the rounded weight, uint8 `(out, blocks, block_bytes)`."""
        blocks = self.block_format.quantize_as_ggml(base)
        quants = self._find_nearest_quants(merged, self._get_grid(base)).to(torch.uint8)
        self.block_format.write_quants(blocks, quants.view(*blocks.shape[:2], -1))
        return blocks

    def _find_nearest_quants(self, merged: Tensor, grid: BlockGrid) -> Tensor:
        """Return which level is nearest to each weight, from 0, in fp32 `(out, sub-blocks, weights)`."""
        values = merged.unflatten(1, (grid.scale.shape[1], -1))
        position = (values if grid.offset is None else values - grid.offset) * grid.inverse_scale
        if self._is_uniform or not _has_values(merged):
            return position.sub_(self._lowest).round_().clamp_(0, self._highest - self._lowest)
        # Half way between two levels is a multiple of a half: a table is faster than `bucketize`.
        half = position.add_(128).mul_(2).clamp_(0, 511).int()
        return self._quant_by_half.to(merged.device).index_select(0, half.flatten()).view_as(position)

    def _get_grid(self, base: Tensor) -> BlockGrid:
        if not _has_values(base):
            scale = base.new_ones(base.shape[0], base.shape[1] // 32, 1)
            return BlockGrid(scale, scale, scale)
        if self._grid is None or self._grid.scale.device != base.device:
            scale, offset = self.block_format.read_scales(self.block_format.quantize_as_ggml(base.cpu()))
            scale = scale.flatten(1).unsqueeze(-1).to(base.device)
            offset = None if offset is None else offset.flatten(1).unsqueeze(-1).to(base.device)
            self._grid = BlockGrid(scale, torch.where(scale == 0, 0, 1 / scale), offset)
        return self._grid


def _has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values: those of a plan do not."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def find_weight_roundings(model: Any, layers: Sequence[str], precision: str) -> dict[str, GgufRounding]:
    """Return how a merged GGUF in a precision rounds the weights of linear layers of a model, by their names.

    Raises:
        UsageError: llama.cpp's names of the model's weights are not known.
        ModelError: its library is not installed, or it rounds a layer to a type that is not in `BLOCK_FORMATS`.
    """
    names = make_gguf_module_name_mapper(model.config)
    tensors = {layer: f"{names(layer)}.weight" for layer in layers}
    shapes = {
        f"{name}.weight": get_in_and_out_features(module)[::-1]
        for module_name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.dim() == 2
        and (name := names(module_name)) is not None
    }
    types = ask_llama_cpp_for_types(model.config, shapes, precision)
    for layer, tensor in tensors.items():
        if types.get(tensor) not in BLOCK_FORMATS:
            message = f"llama.cpp stores {layer} as {types.get(tensor, 'nothing that is known')} in {precision}"
            raise ModelError(message, f"one of {format_names(BLOCK_FORMATS)}", "another precision, or no qat")
    return {layer: GgufRounding(types[tensor]) for layer, tensor in tensors.items()}


def ask_llama_cpp_for_types(config: Any, shapes: dict[str, tuple[int, int]], precision: str) -> dict[str, str]:
    """Return the type that llama.cpp's quantizer chooses for each matrix `(out, in)`, by the tensor's name."""
    with tempfile.TemporaryDirectory(prefix="slimtune-") as folder:
        file = Path(folder, "shapes.gguf")
        _write_shapes(file, config, shapes)
        return find_quantized_types(file, precision)


def _write_shapes(file: Path, config: Any, shapes: dict[str, tuple[int, int]]) -> None:
    """Write a GGUF with the metadata that llama.cpp's quantizer reads, and empty space for the matrices."""
    gguf, text = import_gguf(), config.get_text_config()
    writer = gguf.GGUFWriter(str(file), require_gguf_architecture_spec(config).name)
    heads = text.num_attention_heads
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(text, "num_key_value_heads", None) or heads)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(head_size)
    # Of these the quantizer only asks whether they are there.
    for add in (writer.add_layer_norm_rms_eps, writer.add_layer_norm_eps, writer.add_logit_scale):
        add(1.0)
    writer.add_parallel_residual(True)
    writer.add_sliding_window(getattr(text, "sliding_window", None) or text.max_position_embeddings)
    writer.add_shortconv_l_cache(getattr(text, "conv_L_cache", 1))
    if experts := getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(text.num_experts_per_tok)
    for tensor, shape in shapes.items():
        writer.add_tensor_info(tensor, shape, np.dtype(np.float16), 2 * shape[0] * shape[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    sizes = [-(-2 * rows * columns // alignment) * alignment for rows, columns in shapes.values()]
    with file.open("r+b") as f:
        f.truncate(-(-file.stat().st_size // alignment) * alignment + sum(sizes))


# --- the file --------------------------------------------------------------------------------------------------------


def write_trained_blocks(file: Path, model: Any) -> list[str]:
    """Replace the matrices of a merged GGUF that were trained through its rounding; return the tensors' names.

    llama.cpp's quantizer has written the file and finds scales for the merged weights, which are not those of training.
    ModelError means that a tensor has another type than it had in training.
    """
    names = make_gguf_module_name_mapper(model.config)
    tensors = {t.name: t for t in open_gguf_reader(file).tensors}
    written = []
    with file.open("r+b") as f:
        for layer, module in find_rounded_modules(model).items():
            rounding: Any = module.rounding
            base = get_dequantized_weight(model.get_submodule(layer)).detach().float()
            merged = module.merge_without_rounding(base)
            order = torch.arange(len(base)).unsqueeze(1)
            ((name, rows),) = convert_to_llama_cpp_tensors(f"{layer}.weight", order, model.config, names).items()
            found, trained = tensors[name].tensor_type.name, rounding.type_name
            if found != trained:
                raise ModelError(f"{name} is in {found}, and was trained in {trained}", "the same version of llama.cpp")
            f.seek(tensors[name].data_offset)
            f.write(rounding.make_blocks(merged, base)[rows.flatten()].numpy().tobytes())
            written.append(name)
    return written


def is_trained_precision(model: Any, precision: str) -> bool:
    """Return whether the active adapter was trained through the rounding to this precision."""
    return getattr(model.active_peft_config, "qat", None) == precision.upper()


def find_rounded_modules(model: Any) -> dict[str, RoundedLinearLora]:
    """Return the active adapter's modules that were trained through a rounding, by the layer's name."""
    modules = model.adapter_modules(model.active_adapters[0])
    return {name: module for name, module in modules.items() if isinstance(module, RoundedLinearLora)}
