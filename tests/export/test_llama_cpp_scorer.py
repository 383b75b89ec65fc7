"""Log-probabilities of whole texts by llama.cpp's library, beside transformers and llama.cpp's server."""

from contextlib import closing

import pytest
import torch
from hand_run import save_adapter_of
from tiny_gguf import write_tiny_base

import slimtune
from slimtune.core.models.loader import load_base
from slimtune.core.training.trained_model import load_run
from slimtune.errors import RunError
from slimtune.export.gguf import write_adapter_gguf
from slimtune.export.llama_cpp_scorer import LlamaCppScorer
from slimtune.generation.inference_engines import TransformersInferenceEngine

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
IDS = [1, *range(3, 60), *range(20, 40)]
PLACES = [1, 2, 5, 30, 31, 50, 77]


@pytest.fixture
def base_file(tmp_path, tiny_llama, tiny_tokenizer):
    return write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer)


def score(file, adapter=None, **changes):
    with closing(LlamaCppScorer(file, adapter, max_tokens=len(IDS) + 1, threads=1, **changes)) as scorer:
        first = scorer.score_tokens(IDS, PLACES)
        assert torch.equal(scorer.score_tokens(IDS, PLACES), first)  # nothing of the first text is left
    return first


def test_it_agrees_with_transformers(base_file):
    base = load_base(str(base_file), dtype=torch.float32, device="cpu")
    expected = TransformersInferenceEngine("", base.model, base.tokenizer).score_tokens(IDS, PLACES)
    torch.testing.assert_close(score(base_file), expected, atol=1e-4, rtol=0)


def test_an_adapter_beside_the_base(base_file, tmp_path):
    config = slimtune.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    loaded = load_run(save_adapter_of(base_file, tmp_path / "run", config), device="cpu")
    write_adapter_gguf(tmp_path / "adapter.gguf", loaded.model, loaded.adapter_name)
    expected = TransformersInferenceEngine("", loaded.model, loaded.base.tokenizer).score_tokens(IDS, PLACES)
    torch.testing.assert_close(score(base_file, tmp_path / "adapter.gguf"), expected, atol=5e-3, rtol=0)
    assert not torch.allclose(score(base_file), expected, atol=1e-2)


def test_a_text_of_several_passes(base_file):
    torch.testing.assert_close(score(base_file), score(base_file, pass_tokens=16), atol=1e-4, rtol=0)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RunError):
        LlamaCppScorer(tmp_path / "no.gguf", max_tokens=8)
