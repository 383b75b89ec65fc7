"""Blocks of few-bit formats: what our code reads from bytes, and writes into them, is what ggml computes."""

import ctypes

import pytest
import torch

from slimtune.export.gguf_blocks import BLOCK_FORMATS, load_ggml

pytest.importorskip("llama_cpp_py_sync")
DEQUANTIZERS = {"Q4_K": "q4_K", "Q5_K": "q5_K", "Q6_K": "q6_K"}
"""Parts of ggml's function names that are not the format's name in small letters."""
ROWS, WIDTH = 64, 1024


def dequantize_by_ggml(name: str, blocks: torch.Tensor) -> torch.Tensor:
    function = getattr(load_ggml(), f"dequantize_row_{DEQUANTIZERS.get(name, name.lower())}")
    values = torch.empty(*blocks.shape[:-1], BLOCK_FORMATS[name].block_weights)
    function(ctypes.c_void_p(blocks.data_ptr()), ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel()))
    return values


def make_rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, WIDTH, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    rows[0, :300] = 0  # whole blocks without a scale
    return rows


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_bytes_stand_for_the_floats_that_ggml_computes(name):
    blocks = BLOCK_FORMATS[name].quantize_as_ggml(make_rows())
    assert torch.equal(BLOCK_FORMATS[name].dequantize(blocks), dequantize_by_ggml(name, blocks))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_other_quants_under_ggmls_scales_decode_to_their_levels(name):
    chosen = BLOCK_FORMATS[name]
    blocks = chosen.quantize_as_ggml(make_rows())
    scale, offset = chosen.expand_scales(blocks)
    quants = torch.randint(len(chosen.levels), scale.shape, generator=torch.Generator().manual_seed(1))
    chosen.write_quants(blocks, quants.to(torch.uint8))
    assert torch.equal(chosen.read_quants(blocks).long(), quants)
    assert torch.equal(dequantize_by_ggml(name, blocks), scale * chosen.levels[quants] + offset)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_ggmls_own_quants_give_ggmls_bytes(name):
    chosen = BLOCK_FORMATS[name]
    expected = chosen.quantize_as_ggml(make_rows())
    blocks = expected.clone()
    chosen.write_quants(blocks, torch.full(chosen.read_quants(blocks).shape, 7, dtype=torch.uint8))
    assert not torch.equal(blocks, expected)
    chosen.write_quants(blocks, chosen.read_quants(expected))
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_the_nearest_quant_is_nearest(name):
    chosen, rows = BLOCK_FORMATS[name], make_rows()
    blocks = chosen.quantize_as_ggml(rows)
    scale, offset = chosen.expand_scales(blocks)
    values = rows.view(scale.shape)
    quants = chosen.find_nearest_quants(values, scale, offset)
    every = scale[..., None] * chosen.levels + offset[..., None]
    least = (every - values[..., None]).abs().amin(-1)
    found = (scale * chosen.levels[quants] + offset - values).abs()
    torch.testing.assert_close(found, least, rtol=0, atol=1e-6)
    assert found.square().sum() <= (chosen.dequantize(blocks) - values).square().sum() * 1.0001
