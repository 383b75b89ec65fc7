"""An adapter GGUF says in llama.cpp what the adapter says here, for every architecture in the table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models_zoo import shake
from tiny_ggufs import MAKERS, model_of, write

from slimtune import BottleneckConfig, IA3Config, LoraConfig, get_peft_model
from slimtune.errors import AdapterError, UsageError
from slimtune.export import architectures
from slimtune.export.engines.llama_cpp import LlamaCpp
from slimtune.export.engines.transformers import Transformers
from slimtune.export.gguf import pairs_of, write_adapter
from slimtune.export.verify import Text, Trained, gate

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
VOCABULARY = 320
PATTERNS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"o_proj": 8, "c_attn": 8}, "alpha_pattern": {"down_proj": 4, "c_fc": 4}},
}


def adapted(kind: str, tuned: dict[str, Any] | None = None) -> Any:
    model = model_of(kind, VOCABULARY)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    patterns = dict(tuned or {})
    for name in ("rank_pattern", "alpha_pattern"):  # of the names that this architecture has
        if name in patterns:
            patterns[name] = {k: v for k, v in patterns[name].items() if k.startswith("c_") == (kind == "gpt2")}
    model = get_peft_model(model, LoraConfig(**settings | patterns))
    shake(model)
    return model.eval()


def updates(file: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return alpha, and each map's update as llama.cpp computes it: alpha / r · B A."""
    reader = gguf.GGUFReader(str(file))
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {t.name: torch.tensor(t.data) for t in reader.tensors}
    names = {n.rpartition(".")[0] for n in found}
    parts = {n: (found[f"{n}.lora_a"], found[f"{n}.lora_b"]) for n in names}
    return alpha, {n: alpha / A.shape[0] * B @ A for n, (A, B) in parts.items()}


@pytest.mark.parametrize("tuned", PATTERNS)
@pytest.mark.parametrize("kind", MAKERS)
def test_the_file_holds_each_update_in_llama_cpps_order(kind, tuned, tmp_path):
    model = adapted(kind, PATTERNS[tuned])
    facts = write_adapter(tmp_path / "a.gguf", model)
    _, found = updates(tmp_path / "a.gguf")
    names = architectures.get_tensor_names(model.config)
    pairs = pairs_of(model)
    assert len(found) == len(pairs) == facts["tensors"] // 2 > 0
    for pair in pairs:
        wanted = architectures.permute_rope_rows(pair.scale * pair.B @ pair.A, pair.module, model.config)
        torch.testing.assert_close(found[f"{names.get_name(pair.module)}.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_where_one_alpha_says_it_all_nothing_is_multiplied_into_B(tmp_path):
    model = adapted("llama", {"use_rslora": True})
    assert write_adapter(tmp_path / "a.gguf", model)["alpha"] == pytest.approx(16 * 2)  # alpha / √r · r
    B = {t.name: t.data for t in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors}["blk.0.ffn_up.weight.lora_b"]
    assert torch.equal(torch.tensor(B), model.model.layers[0].mlp.up_proj.adapters["default"].lora_B.weight.detach())


@llama_cpp
@pytest.mark.parametrize("kind", MAKERS)
def test_llama_cpp_says_what_the_adapter_says(kind, tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = adapted(kind, PATTERNS["patterns"])
    base = write(tmp_path / "base.gguf", model_of(kind, VOCABULARY), tokenizer)
    write_adapter(tmp_path / "a.gguf", model)
    verdict = verdict_of(model, tokenizer, base, tmp_path / "a.gguf")
    assert verdict.passed, verdict.reason
    assert verdict.max_difference < 0.01
    assert verdict.effect > 0.1  # there was something to agree on


@llama_cpp
def test_without_the_permutation_the_gate_fails(tmp_path, tiny_tokenizer, monkeypatch):
    tokenizer, model = tiny_tokenizer(), adapted("llama")
    base = write(tmp_path / "base.gguf", model_of("llama", VOCABULARY), tokenizer)
    monkeypatch.setattr("slimtune.export.gguf.in_order", lambda rows, *_: rows)
    write_adapter(tmp_path / "a.gguf", model)
    verdict = verdict_of(model, tokenizer, base, tmp_path / "a.gguf")
    assert verdict.passed is False
    assert "nats" in verdict.reason


def verdict_of(model: Any, tokenizer: Any, base: Path, adapter: Path) -> Any:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 259, (40,), generator=generator).tolist() for _ in range(2)]
    trained = Trained(model, tokenizer, [Text("Say something<|im_end|>", ids) for ids in rows])
    engine = LlamaCpp(base, adapter, longest=128, threads=1)
    try:
        return gate(trained, engine, "f32", answers=1)
    finally:
        engine.close()


def test_f16_holds_what_it_can_and_refuses_what_it_cannot(tmp_path):
    model = adapted("llama")
    write_adapter(tmp_path / "a.gguf", model, precision="f16")
    assert {t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors} == {"F16"}
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.adapters["default"].lora_B.weight[0, 0] = 1e6
    with pytest.raises(AdapterError, match="f16 cannot hold"):
        write_adapter(tmp_path / "b.gguf", model, precision="f16")


def test_what_is_no_lora_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match=r"ia3 adapter is no LoRA(.|\n)*merged"):
        write_adapter(tmp_path / "a.gguf", get_peft_model(model_of("llama", VOCABULARY), IA3Config()))
    bottleneck = get_peft_model(model_of("llama", VOCABULARY), BottleneckConfig())
    with pytest.raises(UsageError, match=r"bottleneck cannot be merged either"):
        write_adapter(tmp_path / "a.gguf", bottleneck)
    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match=r"lm_head \('weight' trained whole\)"):
        write_adapter(tmp_path / "a.gguf", get_peft_model(model_of("llama", VOCABULARY), whole))
    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UsageError, match="no LoRA"):
        write_adapter(tmp_path / "a.gguf", get_peft_model(model_of("llama", VOCABULARY), dora))


def test_an_architecture_without_facts_is_named_and_how_to_add_one(tmp_path):
    model = adapted("llama")
    model.config.model_type = "granite"
    with pytest.raises(UsageError, match=r"'granite' model(.|\n)*architectures\.py"):
        write_adapter(tmp_path / "a.gguf", model)


def test_the_engine_here_gives_log_probabilities_and_an_answer(tiny_tokenizer):
    model = adapted("llama")
    engine = Transformers("trained", model, tiny_tokenizer())
    scores = engine.scores([3, 4, 5, 6])
    assert scores.own.shape == (3,)
    assert torch.all(scores.values[:, :-1] >= scores.values[:, 1:])
    assert len(engine.answer([3, 4, 5], 4)) <= 4
