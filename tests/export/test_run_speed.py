"""`slimtune bench RUN`: how fast a run answers, in each engine."""

import pytest
from hand_run import save_adapter_of
from tiny_gguf import write_tiny_base

import slimtune
from slimtune.export import run_speed
from slimtune.export.run_speed import measure_run_speed

pytest.importorskip("gguf")
WAYS = ["base", "adapter", "merged"]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def run(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    for name, value in {"PROMPT_TOKENS": 16, "NEW_TOKENS": 4, "ROUNDS": 1}.items():
        monkeypatch.setattr(run_speed, name, value)
    base = write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer)
    return save_adapter_of(base, tmp_path / "run", slimtune.LoraConfig(**LORA))


@pytest.mark.slow
def test_base_adapter_and_merged_are_measured_in_each_engine(run):
    pytest.importorskip("xllamacpp")
    found = measure_run_speed(run, device="cpu", progress=lambda _: None)
    assert [(s.engine, s.way) for s in found.speeds] == [(e, w) for e in ("slimtune", "llama.cpp") for w in WAYS]
    assert not found.not_measured
    assert all(s.decode_tokens_per_second > 0 and s.prefill_tokens_per_second > 0 for s in found.speeds)


def test_what_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setattr("slimtune.generation.inference_engines.is_xllamacpp_installed", lambda: False)
    found = measure_run_speed(run, device="cpu", progress=lambda _: None)
    assert [s.way for s in found.speeds] == WAYS
    assert found.not_measured[0].engine == "llama.cpp"
