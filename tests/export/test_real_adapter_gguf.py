"""Adapter GGUFs of real bases in llama.cpp: a right one passes, and a file with one fault does not.

The limits were chosen on SmolLM2 (twice the base's mean, sixteen times its root mean square); Gemma tests them: it has
sliding windows, scaled embeddings and 262,144 tokens, and llama.cpp keeps its q and k rows in place.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gemma_base import join_gemma_gguf

from slimtune import LoraConfig, get_peft_model
from slimtune.core.models.loader import load_base
from slimtune.core.training.trained_model import TrainedModel
from slimtune.errors import AdapterError
from slimtune.export import expected_logps, gguf, merge
from slimtune.export.adapter_file_check import require_trained_adapter_in_gguf
from slimtune.export.expected_logps import ADAPTER_TOLERANCES, AdapterReference, make_fixed_and_held_out_reference_texts
from slimtune.generation.inference_engines import InProcessLlamaCppEngine

pytestmark = [
    pytest.mark.real, pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]  # fmt: skip
TEXT = Path(__file__).parents[2] / "examples" / "devils-dictionary" / "train.jsonl"
POSITIONS = 60


def adapt_and_train(spec):
    """Return a base with a LoRA that four steps on one definition have moved, in float32."""
    base = load_base(spec, dtype="bf16", device="cpu")
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    text = json.loads(TEXT.read_text().splitlines()[0])["messages"][1]["content"]
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loaded = TrainedModel(model.eval(), base, Path(), None)
    model.float()
    merge.set_unrounded_embedding_scales(model)
    return loaded


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma"])
def real_base(request, tmp_path_factory):
    """A trained adapter, the texts it is compared on, and its base as GGUF."""
    loaded = adapt_and_train(str(join_gemma_gguf()) if request.param == "gemma" else request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_logps, "MAX_POSITIONS", POSITIONS)
        texts = make_fixed_and_held_out_reference_texts(loaded.base.tokenizer, None, loaded.model.config)
    file = tmp_path_factory.mktemp("base") / "base.gguf"
    merge.write_base_gguf(loaded, file)
    return loaded.model, AdapterReference(loaded.model, loaded.base.tokenizer, texts), file


def judge(real_base, adapter):
    _, reference, base = real_base
    engine = InProcessLlamaCppEngine(base, adapter, max_tokens=400, threads=1)
    try:
        return expected_logps.judge_engine_against_adapter(
            reference, engine, "f32", ADAPTER_TOLERANCES["f32"], InProcessLlamaCppEngine.without_adapter
        )
    finally:
        engine.close()


def test_right_file_passes(real_base, tmp_path):
    gguf.write_adapter_gguf(tmp_path / "a.gguf", real_base[0])
    verdict = judge(real_base, tmp_path / "a.gguf")
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize("factor", [-1.0, 0.5])
def test_changed_matrices_are_noticed(real_base, tmp_path, factor):
    """A flipped sign of one `lora_b`, and half of the scale of all."""
    matrices = [p for name, p in real_base[0].named_parameters() if "lora_B" in name]
    changed = matrices[len(matrices) // 2 :][:1] if factor < 0 else matrices
    for weight in changed:
        weight.data.mul_(factor)
    gguf.write_adapter_gguf(tmp_path / "a.gguf", real_base[0])
    for weight in changed:
        weight.data.div_(factor)
    assert judge(real_base, tmp_path / "a.gguf").passed is False


def test_merged_in_float32_it_is_the_adapter(real_base):
    """The embedding that Gemma scales and both bases share with their heads stays as it is."""
    model, reference, _ = real_base
    model.merge_adapter()
    merged = reference.differences(reference.score(reference.engine, "merged"))
    model.unmerge_adapter()
    assert reference.effect > 0.1
    assert merged.abs().max() < 1e-4


def test_half_of_a_single_matrix_is_named(real_base, tmp_path):
    """For every kind of module. The log-probabilities of SmolLM2 do not see it: its effect is within their noise."""
    model = real_base[0]
    gguf.write_adapter_gguf(tmp_path / "a.gguf", model)
    require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)
    matrices = {n: p for n, p in model.named_parameters() if ".layers.9." in n and "lora_" in n}
    assert len(matrices) == 14
    for name, weight in matrices.items():
        weight.data.mul_(0.5)
        with pytest.raises(AdapterError, match=name.split(".adapters.")[0].replace(".", r"\.")):
            require_trained_adapter_in_gguf(tmp_path / "a.gguf", model)
        weight.data.mul_(2)


def test_rows_in_another_order_are_noticed(real_base, tmp_path, monkeypatch):
    """llama.cpp's order of q and k rows: left out on SmolLM2, and applied to Gemma, which has none."""
    model = real_base[0]
    if model.config.model_type == "llama":
        monkeypatch.setattr(gguf, "reorder_rows_for_llama_cpp", lambda rows, *_: rows)
    else:
        matrices = [p for name, p in model.named_parameters() if "q_proj" in name and "lora_B" in name]
        before = [weight.detach().clone() for weight in matrices]
        for weight in matrices:
            heads = weight.data.reshape(model.config.num_attention_heads, 2, -1, weight.shape[1])
            weight.data = heads.transpose(1, 2).reshape(weight.shape).contiguous()
    gguf.write_adapter_gguf(tmp_path / "a.gguf", model)
    if model.config.model_type != "llama":
        for weight, old in zip(matrices, before, strict=True):
            weight.data = old
    assert judge(real_base, tmp_path / "a.gguf").passed is False
