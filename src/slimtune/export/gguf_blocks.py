"""Blocks of GGUF's few-bit formats: what scale and offset each weight of a block has, and where its quant is stored.

    value = scale · level[quant] + offset

A row of a matrix is cut into blocks of 32 or 256 weights. A block's bytes hold its scales and one quant for each
weight: an index into the format's levels. Scales come from ggml itself, whose search for them differs between formats;
here they are read from the bytes that ggml wrote, and other quants are written into these bytes. Layout: llama.cpp,
`ggml/src/ggml-common.h` and `dequantize_row_*` in `ggml/src/ggml-quants.c`.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, format_install_command
from .llama_cpp_tools import QUANTIZER_PACKAGE

NONLINEAR_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Of IQ4_NL and IQ4_XS: `kvalues_iq4nl`."""


@dataclass(frozen=True)
class BlockFormat:
    """One format; its functions take tensors of blocks: bytes `(…, block_bytes)`, weights `(…, block_weights)`."""

    number: int
    """ggml's `ggml_type`."""
    block_weights: int
    block_bytes: int
    levels: Tensor
    """Ascending, fp32."""
    read_scales: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Bytes to scales and offsets of the sub-blocks `(…, sub-blocks)`, fp32; None: all offsets are zero."""
    read_quants: Callable[[Tensor], Tensor]
    """Bytes to quants, uint8."""
    write_quants: Callable[[Tensor, Tensor], None]
    """Replaces the quants in bytes; scales stay."""

    def expand_scales(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the offset of each weight, fp32 `(…, block_weights)`."""
        scale, offset = self.read_scales(blocks)
        repeats = self.block_weights // scale.shape[-1]
        offset = torch.zeros_like(scale) if offset is None else offset
        return scale.repeat_interleave(repeats, -1), offset.repeat_interleave(repeats, -1)

    def dequantize(self, blocks: Tensor) -> Tensor:
        """Return the weights that bytes stand for, the floats that ggml computes from them."""
        scale, offset = self.expand_scales(blocks)
        return scale * self.levels[self.read_quants(blocks).long()] + offset

    def find_nearest_quants(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the quant nearest to each value, int64. A scale of zero leaves no choice."""
        position = torch.where(scale == 0, 0.0, (values - offset) / scale)
        if self.levels is _NONLINEAR:
            return torch.bucketize(position, _NONLINEAR_BOUNDARIES)
        return (position - self.levels[0]).round_().clamp_(0, len(self.levels) - 1).long()

    def quantize_as_ggml(self, rows: Tensor, importances: Tensor | None = None) -> Tensor:
        """Return ggml's bytes of rows `(rows, n)`, uint8 `(rows, n / block_weights, block_bytes)`.

        `importances` `(n,)` weight the squared errors of the columns where ggml searches for scales.

        ModelError means that ggml is not installed.
        """
        rows = rows.detach().to(torch.float32).contiguous()
        weights = None if importances is None else importances.to(torch.float32).contiguous()
        weights_pointer = weights.data_ptr() if weights is not None else None
        count, width = rows.shape
        blocks = torch.empty(count, width // self.block_weights, self.block_bytes, dtype=torch.uint8)
        load_ggml().ggml_quantize_chunk(
            self.number, rows.data_ptr(), blocks.data_ptr(), 0, count, width, weights_pointer
        )
        return blocks


@functools.cache
def load_ggml() -> ctypes.CDLL:
    """Return ggml's library, of the package that also brings llama.cpp's quantizer; ModelError if there is none."""
    spec = importlib.util.find_spec(QUANTIZER_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    files = [f for f in sorted(folder.glob("*ggml-base*")) if spec is not None]
    if not files:
        raise ModelError("ggml's library is not installed", hint=format_install_command("export-check"))
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library


# --- where quants are stored -----------------------------------------------------------------------------------------


def _read_nibbles(stored: Tensor, group: int) -> Tensor:
    """Return the low halves of bytes, then the high halves, `group` weights at a time."""
    pairs = stored.unflatten(-1, (-1, group // 2))
    return torch.cat([pairs & 15, pairs >> 4], -1).flatten(-2)


def _write_nibbles(quants: Tensor, group: int) -> Tensor:
    """Return the bytes that `_read_nibbles` reads."""
    pairs = (quants & 15).unflatten(-1, (-1, 2, group // 2))
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)


def _read_fields(stored: Tensor, bits: int) -> Tensor:
    """Return the lowest `bits` bits of all bytes `(…, bytes)`, then the next ones: `(…, fields, bytes)`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return stored.unsqueeze(-2) >> shifts.unsqueeze(-1) & 2**bits - 1


def _write_fields(fields: Tensor, bits: int) -> Tensor:
    """Return the bytes that `_read_fields` reads."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (fields << shifts.unsqueeze(-1)).sum(-2, dtype=torch.uint8)


def _read_four_bits(start: int, group: int) -> Callable[[Tensor], Tensor]:
    return lambda blocks: _read_nibbles(blocks[..., start:], group)


def _write_four_bits(start: int, group: int) -> Callable[[Tensor, Tensor], None]:
    def write(blocks: Tensor, quants: Tensor) -> None:
        blocks[..., start:] = _write_nibbles(quants, group)

    return write


def _read_five_bits(start: int) -> Callable[[Tensor], Tensor]:
    """Q5_0 and Q5_1: four bytes hold the fifth bits in the weights' order, sixteen the others."""

    def read(blocks: Tensor) -> Tensor:
        fifth = _read_fields(blocks[..., start : start + 4], 1).mT.flatten(-2)
        return _read_nibbles(blocks[..., start + 4 :], 32) | fifth << 4

    return read


def _write_five_bits(start: int) -> Callable[[Tensor, Tensor], None]:
    def write(blocks: Tensor, quants: Tensor) -> None:
        blocks[..., start : start + 4] = _write_fields((quants >> 4).unflatten(-1, (4, 8)).mT, 1)
        blocks[..., start + 4 :] = _write_nibbles(quants, 32)

    return write


def _read_q8_0_quants(blocks: Tensor) -> Tensor:
    return blocks[..., 2:] ^ 128  # signed bytes: -128 is the lowest level


def _write_q8_0_quants(blocks: Tensor, quants: Tensor) -> None:
    blocks[..., 2:] = quants ^ 128


def _read_q5_k_quants(blocks: Tensor) -> Tensor:
    fifth = _read_fields(blocks[..., 16:48], 1).flatten(-2)
    return _read_nibbles(blocks[..., 48:], 64) | fifth << 4


def _write_q5_k_quants(blocks: Tensor, quants: Tensor) -> None:
    blocks[..., 16:48] = _write_fields((quants >> 4).unflatten(-1, (8, 32)), 1)
    blocks[..., 48:] = _write_nibbles(quants, 64)


def _read_q6_k_quants(blocks: Tensor) -> Tensor:
    high = _read_fields(blocks[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    return _read_nibbles(blocks[..., :128], 128) | high << 4


def _write_q6_k_quants(blocks: Tensor, quants: Tensor) -> None:
    blocks[..., :128] = _write_nibbles(quants, 128)
    blocks[..., 128:192] = _write_fields((quants >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)


# --- where scales are stored -----------------------------------------------------------------------------------------


def _read_halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """Return `count` numbers in f16 as fp32 `(…, count)`."""
    return blocks[..., start : start + 2 * count].contiguous().view(torch.float16).float()


def _read_scale(blocks: Tensor) -> tuple[Tensor, None]:
    return _read_halves(blocks, 0), None


def _read_scale_and_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    both = _read_halves(blocks, 0, 2)
    return both[..., :1], both[..., 1:]


def _read_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: scales and minima of eight sub-blocks in six bits each, times a scale of the block."""
    first, second, mixed = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, mixed & 15 | first >> 6 << 4], -1)
    minima = torch.cat([second & 63, mixed >> 4 | second >> 6 << 4], -1)
    both = _read_halves(blocks, 0, 2)
    return both[..., :1] * scales, -(both[..., 1:] * minima)


def _read_q6_k_scales(blocks: Tensor) -> tuple[Tensor, None]:
    return _read_halves(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8), None


def _read_iq4_xs_scales(blocks: Tensor) -> tuple[Tensor, None]:
    low = _read_fields(blocks[..., 4:8], 4).mT.flatten(-2)
    high = _read_fields(blocks[..., 2:4], 2).mT.flatten(-2)
    return _read_halves(blocks, 0) * ((low | high << 4).float() - 32), None


# --- the formats -----------------------------------------------------------------------------------------------------


def _levels(lowest: int, count: int) -> Tensor:
    # A plan may import this where tensors are made on meta by default.
    return torch.arange(lowest, lowest + count, dtype=torch.float32, device="cpu")


_NONLINEAR = torch.tensor(NONLINEAR_LEVELS, dtype=torch.float32, device="cpu")
_NONLINEAR_BOUNDARIES = (_NONLINEAR[1:] + _NONLINEAR[:-1]) / 2
BLOCK_FORMATS = {
    "Q4_0": BlockFormat(2, 32, 18, _levels(-8, 16), _read_scale, _read_four_bits(2, 32), _write_four_bits(2, 32)),
    "Q4_1": BlockFormat(
        3, 32, 20, _levels(0, 16), _read_scale_and_minimum, _read_four_bits(4, 32), _write_four_bits(4, 32)
    ),
    "Q5_0": BlockFormat(6, 32, 22, _levels(-16, 32), _read_scale, _read_five_bits(2), _write_five_bits(2)),
    "Q5_1": BlockFormat(7, 32, 24, _levels(0, 32), _read_scale_and_minimum, _read_five_bits(4), _write_five_bits(4)),
    "Q8_0": BlockFormat(8, 32, 34, _levels(-128, 256), _read_scale, _read_q8_0_quants, _write_q8_0_quants),
    "Q4_K": BlockFormat(
        12, 256, 144, _levels(0, 16), _read_k_scales, _read_four_bits(16, 64), _write_four_bits(16, 64)
    ),
    "Q5_K": BlockFormat(13, 256, 176, _levels(0, 32), _read_k_scales, _read_q5_k_quants, _write_q5_k_quants),
    "Q6_K": BlockFormat(14, 256, 210, _levels(-32, 64), _read_q6_k_scales, _read_q6_k_quants, _write_q6_k_quants),
    "IQ4_NL": BlockFormat(20, 32, 18, _NONLINEAR, _read_scale, _read_four_bits(2, 32), _write_four_bits(2, 32)),
    "IQ4_XS": BlockFormat(
        23, 256, 136, _NONLINEAR, _read_iq4_xs_scales, _read_four_bits(8, 32), _write_four_bits(8, 32)
    ),
}
"""By ggml's name of the type."""
