"""A run shipped every way on a tiny base, each asked by the engine that serves it; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slimtune
from slimtune.cli import app
from slimtune.errors import AdapterError, ModelError, RunError, UsageError
from slimtune.export import gguf_model
from slimtune.export.exporter import ExportOptions, export
from slimtune.export.folder import NOTE, read_note
from slimtune.export.verify_formats import verify
from slimtune.models.loader import load_base

sys.path.append(str(Path(__file__).parents[1] / "models"))
from models_zoo import shake
from tiny_gguf import write_gguf

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    """A tiny Llama as a GGUF file, which is how Ollama's users have theirs."""
    place = tmp_path_factory.mktemp("bases")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIMTUNE_CACHE", str(place / "cache"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])  # what write_gguf's merges make
    yield write_gguf(place / "tiny base.gguf", tiny_llama(vocab_size=261, head_dim=8), tokenizer)
    patch.undo()


def adapter_on(base: Path, folder: Path, config: Any) -> Path:
    """Write an adapter that does something, of a base that is named by its path."""
    loaded = load_base(str(base), dtype="float32", device="cpu")
    model = slimtune.get_peft_model(loaded.model, config)
    shake(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    return adapter_on(base, tmp_path_factory.mktemp("runs") / "lora", slimtune.LoraConfig(**LORA))


def test_an_adapter_gguf_is_written_and_llama_cpp_agrees(run, tmp_path):
    found = export(run, "gguf", tmp_path / "out", threads=1)
    assert set(found["files"]) == {"adapter.gguf", NOTE}
    assert found["check"]["passed"] is True
    assert found["check"]["prompts_equal"] == found["check"]["prompts"] > 0
    assert read_note(tmp_path / "out")["kind"] == "gguf"  # type: ignore[index]
    assert verify(tmp_path / "out", threads=1)["passed"]


@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_a_merged_gguf_needs_nothing_beside_it(run, precision, tmp_path):
    found = export(run, "gguf", tmp_path / "out", ExportOptions(merged=True, precision=precision), threads=1)
    assert set(found["files"]) == {"model.gguf", NOTE}
    assert found["check"]["passed"] is True
    assert found["check"]["engine"] == "llama.cpp, merged GGUF"


def test_a_folder_for_ollama(run, base, tmp_path):
    found = export(run, "ollama", tmp_path / "my model", ExportOptions(name="mine", system='Say "ho".'), threads=1)
    text = (tmp_path / "my model" / "Modelfile").read_text()
    assert str(base) in text
    assert "ADAPTER ./adapter.gguf" in text
    assert found["commands"][0] == f"ollama create mine -f '{tmp_path}/my model/Modelfile'"
    assert found["check"]["passed"] is True


def test_a_merged_model_for_ollama_stands_on_itself(run, tmp_path):
    found = export(run, "ollama", tmp_path / "out", ExportOptions(merged=True, name="mine"), threads=1)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text
    assert "ADAPTER" not in text
    assert "TEMPLATE" in text
    assert found["check"]["passed"] is True


def test_a_folder_for_vllm_is_read_back(run, tmp_path):
    found = export(run, "vllm", tmp_path / "out", threads=1)
    assert {"adapter_config.json", "adapter_model.safetensors", "serve.sh"} <= set(found["files"])
    assert found["commands"][0].startswith("vllm serve ")
    assert found["check"]["passed"] is True
    assert found["check"]["max_difference"] < 1e-4
    nobody = verify(tmp_path / "out", vllm="http://127.0.0.1:9", threads=1)
    assert nobody["passed"] is False  # what was asked for has no answer
    assert nobody["checks"][-1]["passed"] is None
    assert "not checked" in nobody["checks"][-1]["reason"]


def test_everything_a_run_can_ship_as_is_asked(run):
    found = verify(run, threads=1)
    assert [c["engine"] for c in found["checks"]] == [
        "merged folder",
        "llama.cpp, adapter GGUF",
        "llama.cpp, merged GGUF",
    ]
    assert found["passed"], [c["reason"] for c in found["checks"]]


@pytest.mark.parametrize(
    ("config", "merges"),
    [
        (slimtune.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), True),
        (slimtune.LoraConfig(**LORA, use_dora=True), True),
        (slimtune.BottleneckConfig(), False),
        (slimtune.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), False),
        (slimtune.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), False),
    ],
    ids=["ia3", "dora", "bottleneck", "prefix", "prompt"],
)
def test_what_is_no_lora_ships_merged_or_is_refused_by_name(config, merges, base, tmp_path):
    run = adapter_on(base, tmp_path / "run", config)
    for to in ("gguf", "ollama", "vllm"):
        with pytest.raises((UsageError, AdapterError), match=r"(?i)merge|slimtune \(?generate") as refused:
            export(run, to, tmp_path / to, threads=1)
        assert config.name in str(refused.value) or "dora" in str(refused.value).lower()
        assert not (tmp_path / to).exists()
    if merges:
        assert export(run, "ollama", tmp_path / "m", ExportOptions(merged=True, name="m"), threads=1)["check"]["passed"]
        assert export(run, "gguf", tmp_path / "l", ExportOptions(as_lora=16), threads=1)["conversion"]["error"] < 1
    else:
        with pytest.raises((UsageError, AdapterError)):
            export(run, "gguf", tmp_path / "m", ExportOptions(merged=True), threads=1)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_export_that_says_something_else_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.export.gguf.in_order", lambda rows, *_: rows)
    with pytest.raises(RunError, match="does not say what the trained adapter says"):
        export(run, "gguf", tmp_path / "out", threads=1)
    assert list(tmp_path.iterdir()) == []
    written = export(run, "gguf", tmp_path / "out", prove=False)
    assert written["check"]["passed"] is None
    assert verify(tmp_path / "out", threads=1)["passed"] is False


def test_a_damaged_adapter_file_is_told(run, tmp_path):
    out = tmp_path / "out"
    export(run, "gguf", out, prove=False)
    (out / "adapter.gguf").write_bytes((out / "adapter.gguf").read_bytes()[:2000])
    found = verify(out, threads=1)
    assert found["passed"] is False
    assert "cannot load" in found["checks"][0]["reason"]


def test_without_llama_cpp_nothing_counts_as_proven(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.export.engines.llama_cpp.installed", lambda: False)
    found = export(run, "gguf", tmp_path / "out")
    assert found["check"]["passed"] is None
    assert "xllamacpp is not installed" in found["check"]["reason"]
    assert verify(tmp_path / "out")["passed"] is False


def test_wrong_use_is_told_before_anything_is_loaded(run, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'ollama'"):
        export(run, "olama", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--merged takes every precision"):
        export(run, "gguf", tmp_path / "out", ExportOptions(precision="q8_0"))
    with pytest.raises(UsageError, match="no adapter left"):
        export(run, "gguf", tmp_path / "out", ExportOptions(merged=True, as_lora=4))
    with pytest.raises(UsageError, match="--system, --dtype: nothing reads that in an export to gguf"):
        export(run, "gguf", tmp_path / "out", ExportOptions(system="Be brief.", dtype="float32"))
    with pytest.raises(UsageError, match="--precision: nothing reads that in an export to vllm"):
        export(run, "vllm", tmp_path / "out", ExportOptions(precision="f16"))
    with pytest.raises(UsageError, match="stands on nothing"):
        export(run, "ollama", tmp_path / "out", ExportOptions(merged=True, base_from="llama3.1:8b"))
    with pytest.raises(UsageError, match="slimtune merge"):
        export(run, "vllm", tmp_path / "out", ExportOptions(merged=True))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(UsageError, match="already holds files"):
        export(run, "gguf", tmp_path / "used")
    with pytest.raises(UsageError, match="there is no run folder"):
        export(tmp_path / "nothing", "gguf", tmp_path / "out")


def test_a_precision_of_llama_quantizes_needs_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model.shutil, "which", lambda _: None)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ModelError, match="llama-quantize, which is not here"):
        export(run, "gguf", tmp_path / "out", ExportOptions(merged=True, precision="Q4_K_M"))
    assert list(tmp_path.iterdir()) == []


def test_llama_quantize_is_called_where_it_is(run, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(program.parent))
    wish = ExportOptions(merged=True, precision="Q4_K_M")
    assert export(run, "gguf", tmp_path / "out", wish, threads=1)["check"]["precision"] == "Q4_K_M"
    program.write_text("#!/bin/sh\necho no such type >&2; exit 3\n")
    with pytest.raises(RunError, match="no such type"):
        export(run, "gguf", tmp_path / "again", wish)


def test_a_base_that_is_no_gguf_asks_for_llama_cpps_converter(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model.shutil, "which", lambda _: None)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = adapter_on(tiny_folder, tmp_path / "run", slimtune.LoraConfig(**LORA))
    found = export(run, "gguf", tmp_path / "out")
    assert found["check"]["passed"] is None
    assert "convert_hf_to_gguf.py, which is not here" in found["check"]["reason"]
    with pytest.raises(ModelError, match="convert_hf_to_gguf"):
        export(run, "gguf", tmp_path / "m", ExportOptions(merged=True))
    with pytest.raises(UsageError, match="--from NAME"):
        export(run, "ollama", tmp_path / "o")
    named = export(run, "ollama", tmp_path / "o", ExportOptions(base_from="llama3.1:8b"), prove=False)
    assert "FROM llama3.1:8b" in (tmp_path / "o" / "Modelfile").read_text()
    assert named["template"] is False


def test_the_command_line_prints_one_object_and_exits_by_the_gate(run, tmp_path):
    def slimtune_(*args: str) -> Any:
        return CliRunner().invoke(app, [*args, "--threads", "1", "--json"])

    done = slimtune_("export", str(run), "--to", "gguf", "--out", str(tmp_path / "o"))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["check"]["passed"] is True
    (tmp_path / "o" / "adapter.gguf").write_bytes(b"GGUF")
    done = slimtune_("verify", str(tmp_path / "o"))
    assert done.exit_code == 1
    assert json.loads(done.stdout)["passed"] is False
    assert "not what was trained" in done.stderr
