"""A run exported to every target on a tiny base, each checked by the engine that serves it; and what is refused."""

import importlib.util
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from error_facts import has_code
from hand_run import save_adapter_of
from tiny_gguf import write_tiny_base
from typer.testing import CliRunner

import slimtune
from slimtune.cli import app
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.models.loader import load_base
from slimtune.diagnostics.knowledge import infer_error_code
from slimtune.errors import AdapterError, ModelError, RunError, UsageError
from slimtune.export import expected_logps as reference
from slimtune.export import gguf as gguf_module
from slimtune.export import llama_cpp_tools, served_base
from slimtune.export import merge as module_merge
from slimtune.export.export_format import EXPORT_FORMATS
from slimtune.export.exporter import export
from slimtune.export.manifest import EXPORT_MANIFEST, ExportManifest, read_export_manifest
from slimtune.export.verify import ServedPlace, find_nearest_lora_error_tolerance, verify
from slimtune.generation.mlx_engine import is_mlx_lm_installed

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
FORMATS: dict[str, dict[str, Any]] = {"merged": {}, "gguf": {}, "mlx": {}, "ollama": {"name": "mine"}, "vllm": {}}
"""The options with which the tests that run over every format export to each."""
MARKS = {
    "ollama": [pytest.mark.slow],
    "mlx": [pytest.mark.slow, pytest.mark.skipif(not is_mlx_lm_installed(), reason="mlx-lm is not installed")],
}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    """A tiny Llama as a GGUF file, which is how Ollama's users have theirs."""
    place = tmp_path_factory.mktemp("bases")
    patch = pytest.MonkeyPatch()
    patch.setenv("SLIMTUNE_CACHE", str(place / "cache"))
    yield write_tiny_base(place / "tiny base.gguf", tiny_llama, tiny_tokenizer)
    patch.undo()


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    return save_adapter_of(base, tmp_path_factory.mktemp("runs") / "lora", slimtune.LoraConfig(**LORA))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch, request):
    """Compare on a third of the tokens that users compare on: llama.cpp gives one at a time."""
    if "wrong_merges" in request.node.name:  # small faults, which few tokens do not show
        return
    for name, value in {"MAX_TOKENS": 48, "MAX_POSITIONS": 100, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 6}.items():
        monkeypatch.setattr(reference, name, value)


@pytest.fixture
def no_llama_cpp(monkeypatch):
    monkeypatch.setattr(llama_cpp_tools.shutil, "which", lambda _: None)
    monkeypatch.setattr(llama_cpp_tools, "QUANTIZER_PACKAGE", "not_installed")
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def test_every_format_has_a_case():
    assert {*FORMATS} == {*EXPORT_FORMATS.built_in_names()}, "one line per format in FORMATS"


def test_method_without_exports_is_refused_before_its_base_is_loaded(base, tmp_path, monkeypatch):
    config = slimtune.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    run = save_adapter_of(base, tmp_path / "run", config)
    monkeypatch.setattr("slimtune.export.exporter.load_run_for_export", lambda *_: pytest.fail("it loads the base"))
    for target in ("ollama", "gguf", "vllm"):
        with pytest.raises(AdapterError, match="prompt_tuning"):
            export(run, target, tmp_path / "out")
    monkeypatch.setattr("slimtune.export.merge.load_run_for_export", lambda *_: pytest.fail("it loads the base"))
    with pytest.raises(AdapterError, match="prompt_tuning"):
        module_merge.merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=MARKS.get(k, [])) for k in FORMATS])
def test_every_format_is_proven_and_a_damaged_one_is_not(kind, run, tmp_path):
    out = tmp_path / "out"
    if kind == "merged":  # `slimtune merge`, no target of `slimtune export`
        module_merge.merge(run, out)
    else:
        assert export(run, kind, out, FORMATS[kind], threads=1).check.passed
    assert verify(out, threads=1).passed
    weights = max((f for f in out.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 : len(data) * 3 // 4] = bytes(len(data) * 3 // 4 - len(data) // 2)
    weights.write_bytes(data)
    assert not verify(out, threads=1).passed


@pytest.mark.slow
def test_adapter_gguf(run, tmp_path):
    found = export(run, "gguf", tmp_path / "out", threads=1)
    assert set(found.files) == {"adapter.gguf", EXPORT_MANIFEST}
    assert found.check.passed is True
    assert found.check.prompts_equal == found.check.prompts > 0
    assert found.check.strength == pytest.approx(1, abs=0.01)
    assert found.check.effect > 0.05
    assert read_export_manifest(tmp_path / "out").kind == "gguf"  # type: ignore[union-attr]
    serve = shlex.split(found.commands[1], comments=True)
    assert serve == ["slimtune", "serve", str(run), "--engine", "llama.cpp"]
    assert verify(tmp_path / "out", threads=1).passed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["f32", "f16", "q8_0"])
def test_merged_gguf(run, precision, tmp_path):
    found = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": precision}, threads=1)
    assert set(found.files) == {"model.gguf", EXPORT_MANIFEST}
    assert (found.check.engine, found.check.passed) == ("llama.cpp, merged GGUF", True)


@pytest.mark.slow
def test_ollama(run, base, tmp_path):
    options = {"merged": False, "name": "mine", "system": 'Say "ho".'}
    found = export(run, "ollama", tmp_path / "my model", options, threads=1)
    text = (tmp_path / "my model" / "Modelfile").read_text()
    assert str(base) in text
    assert "ADAPTER ./adapter.gguf" in text
    assert found.commands[0] == f"ollama create mine -f '{tmp_path}/my model/Modelfile'"
    assert found.check.passed is True


@pytest.mark.slow
def test_ollama_merged(run, tmp_path):
    found = export(run, "ollama", tmp_path / "out", {"name": "mine"}, threads=1)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text
    assert "TEMPLATE" in text
    assert "ADAPTER" not in text
    assert found.check.passed is True


def test_vllm(run, tmp_path):
    found = export(run, "vllm", tmp_path / "out", threads=1)
    assert {"adapter_config.json", "adapter_model.safetensors", "serve.sh"} <= set(found.files)
    assert found.commands[0].startswith("vllm serve ")
    assert found.check.passed is True
    assert found.check.max_difference < 1e-4
    with pytest.raises(ModelError):  # what was asked for has no answer
        verify(tmp_path / "out", place=ServedPlace("http://127.0.0.1:9"), threads=1)


def test_a_converter_that_fails_proves_nothing(tiny_folder, monkeypatch, tmp_path):
    run = save_adapter_of(tiny_folder, tmp_path / "run", slimtune.LoraConfig(**LORA))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('strange architecture')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    done = CliRunner().invoke(app, ["verify", str(run)], env={"COLUMNS": "80"})
    assert done.exit_code == 1
    assert ": llama.cpp, adapter GGUF, llama.cpp, merged GGUF" in " ".join(done.output.split())
    assert "NOT PROVEN" in done.stdout
    assert "strange architecture" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_verify_a_run(run):
    found = verify(run, threads=1)
    expected = ["merged folder", "llama.cpp, adapter GGUF", "llama.cpp, merged GGUF"]
    assert [c.engine for c in found.checks] == expected
    assert found.passed, [c.reason for c in found.checks]


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
@pytest.mark.slow
def test_other_methods_are_merged_or_refused(config, merges, base, tmp_path):
    run, merged = save_adapter_of(base, tmp_path / "run", config), {"merged": True, "name": "m"}
    for to in ("gguf", "ollama", "vllm"):
        with pytest.raises((UsageError, AdapterError), match=r"(?i)merge|slimtune \(?generate") as refused:
            export(run, to, tmp_path / to, {"merged": False}, threads=1)
        assert config.name in str(refused.value) or "dora" in str(refused.value).lower()
        assert not (tmp_path / to).exists()
    if merges:
        assert export(run, "ollama", tmp_path / "m", merged, threads=1).check.passed
        converted = export(run, "gguf", tmp_path / "l", {"convert_to_lora": 16}, threads=1)
        assert converted.facts["conversion"]["error"] < 1
    else:
        with pytest.raises((UsageError, AdapterError)):
            export(run, "ollama", tmp_path / "m", merged)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_wrong_export_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.export.gguf.reorder_rows_for_llama_cpp", lambda rows, *_: rows)
    with pytest.raises(RunError, check=has_code("merge-differs")):
        export(run, "gguf", tmp_path / "out", threads=1)
    assert list(tmp_path.iterdir()) == []
    assert export(run, "gguf", tmp_path / "out", verify=False).check.passed is None
    assert verify(tmp_path / "out", threads=1).passed is False


def test_without_llama_cpp_nothing_is_verified(run, tmp_path, monkeypatch):
    monkeypatch.setattr("slimtune.generation.inference_engines.is_xllamacpp_installed", lambda: False)
    check = export(run, "gguf", tmp_path / "out").check
    assert check.passed is None
    assert "slimtune[export-check]" in check.reason
    assert verify(tmp_path / "out").passed is False


WRONG = {
    "did you mean 'ollama'": ("olama", {}),
    "--merged takes every precision": ("gguf", {"precision": "q8_0"}),
    "has no adapter": ("gguf", {"merged": True, "convert_to_lora": 4}),
    "--system, --dtype has no effect in an export to gguf": ("gguf", {"system": "Be brief.", "dtype": "float32"}),
    "--precision has no effect in an export to vllm": ("vllm", {"precision": "f16"}),
    "contains its base": ("ollama", {"merged": True, "ollama_base": "llama3.1:8b"}),
    "slimtune merge": ("vllm", {"merged": True}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options(run, tmp_path, message):
    target, options = WRONG[message]
    with pytest.raises(UsageError, match=message):
        export(run, target, tmp_path / "out", options)


def test_wrong_folders(run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    with pytest.raises(UsageError, match="files"):
        export(run, "gguf", tmp_path / "used")
    with pytest.raises(UsageError, match=str(tmp_path / "nothing")):
        export(tmp_path / "nothing", "gguf", tmp_path / "out")


@pytest.mark.slow
def test_llama_quantize_where_the_package_has_no_wheel(run, tmp_path, monkeypatch, no_llama_cpp):
    options, program = {"merged": True, "precision": "Q4_K_M"}, tmp_path / "bin" / "llama-quantize"
    with pytest.raises(ModelError, match="llama-quantize"):
        export(run, "gguf", tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(program.parent))
    assert export(run, "gguf", tmp_path / "out", options, threads=1).check.precision == "Q4_K_M"
    program.write_text("#!/bin/sh\necho strange type >&2; exit 3\n")
    with pytest.raises(RunError, match="strange type"):
        export(run, "gguf", tmp_path / "again", options)


def test_base_that_is_not_a_gguf(tiny_folder, tmp_path, no_llama_cpp):
    run = save_adapter_of(tiny_folder, tmp_path / "run", slimtune.LoraConfig(**LORA))
    check = export(run, "gguf", tmp_path / "out").check
    assert check.passed is None
    assert "convert_hf_to_gguf.py" in check.reason
    named = export(run, "ollama", tmp_path / "o", {"ollama_base": "mine:8b"}, verify=False)
    assert "FROM mine:8b" in (tmp_path / "o" / "Modelfile").read_text()
    assert to_json_dict(named)["template"] is False


def test_a_missing_converter_is_said_before_the_base_is_loaded(tiny_folder, tmp_path, no_llama_cpp, monkeypatch):
    run = save_adapter_of(tiny_folder, tmp_path / "run", slimtune.LoraConfig(**LORA))
    monkeypatch.setattr("slimtune.export.exporter.load_run_for_export", lambda _: pytest.fail("the base was loaded"))
    for target, options, error, words in (
        ("gguf", {"merged": True}, ModelError, "git clone --depth 1 https://github.com/ggml-org/llama.cpp"),
        ("ollama", {}, ModelError, "convert_hf_to_gguf.py(.|\n)*git clone"),
        ("ollama", {"merged": True, "precision": "Q4_K_M"}, ModelError, "llama-quantize(.|\n)*precision q8_0"),
        ("ollama", {"merged": False}, UsageError, "leave --no-merged out(.|\n)*--ollama-base NAME"),
    ):
        with pytest.raises(error, match=words) as refused:
            export(run, target, tmp_path / "out", options)
        e = refused.value
        assert infer_error_code(f"{e.message}\n{e.expected}\n{e.hint}", e.code) == "llama-cpp-tools"
    assert not (tmp_path / "out").exists()


# --- Ollama's own base -----------------------------------------------------------------------------------------------


def to_ollama(run: Path, out: Path, base: object, **options: Any) -> dict[str, Any]:
    return export(run, "ollama", out, {"ollama_base": str(base)}, threads=1, **options)


@pytest.mark.parametrize("verified", [True, False])
def test_a_name_of_another_base_is_refused(run, tmp_path, verified):
    with pytest.raises(UsageError, match=r"llama3\.1:8b (.|\n)*layers 32(.|\n)*layers 2"):
        to_ollama(run, tmp_path / "out", "llama3.1:8b", verify=verified)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_unknown_name_is_not_proven(run, tmp_path):
    found = to_ollama(run, tmp_path / "out", "somebody/model:1b")
    assert found.check.passed is None
    assert "somebody/model:1b" in found.check.reason
    assert found.check.positions > 0
    assert verify(tmp_path / "out", threads=1).passed is False
    with pytest.raises(RunError, match="proven"):
        to_ollama(run, tmp_path / "proof", "somebody/model:1b", require_proof=True)
    assert not (tmp_path / "proof").exists()


@pytest.mark.slow
def test_a_known_name_of_this_family_is_not_proven(run, base, tmp_path, monkeypatch):
    model = load_base(str(base), dtype="float32", device="cpu").model
    monkeypatch.setattr(served_base, "load_base_config", lambda name: SimpleNamespace(config=model.config))
    check = to_ollama(run, tmp_path / "out", "tiny").check
    assert (check.passed, "size" in check.reason) == (None, True)


@pytest.mark.slow
def test_a_gguf_of_the_base_is_asked_itself(run, base, tmp_path):
    quantized = write_whole(base, tmp_path / "q8.gguf", "q8_0")
    check = to_ollama(run, tmp_path / "out", quantized).check
    assert (check.passed, check.precision) == (True, "q8_0"), check.reason
    assert to_ollama(run, tmp_path / "same", base, require_proof=True).check.passed
    assert verify(tmp_path / "out", threads=1).passed


def write_whole(base: Path, file: Path, precision: str, change: Any = lambda model: None) -> Path:
    model = load_base(str(base), dtype="float32", device="cpu").model
    change(model)
    gguf_module.write_gguf_from_template(base, model, file, precision)
    return file


def scale_norms(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.weight.data *= 1.01


def tune_one_layer(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight += 0.03 * weight.std() * torch.randn(weight.shape)


@pytest.mark.parametrize(("change", "words"), [(scale_norms, "its norms differ"), (tune_one_layer, "its blk.1.ffn_up")])
def test_a_gguf_of_a_sibling_is_refused(run, base, tmp_path, change, words):
    sibling = write_whole(base, tmp_path / "sibling.gguf", "f16", change)
    with pytest.raises(UsageError, match=words):
        to_ollama(run, tmp_path / "out", sibling)


def test_a_gguf_of_another_shape_is_refused(run, tmp_path, tiny_llama, tiny_tokenizer):
    other = write_tiny_base(tmp_path / "o.gguf", tiny_llama, tiny_tokenizer, intermediate_size=96)
    with pytest.raises(UsageError, check=has_code("wrong-base")):
        to_ollama(run, tmp_path / "out", other)


@pytest.mark.slow
def test_a_model_that_ollama_has_here_is_compared(run, base, tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    manifest = tmp_path / "manifests/registry.ollama.ai/library/tiny/1b"
    manifest.parent.mkdir(parents=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:12"}]
    manifest.write_text(json.dumps({"layers": layers}))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "sha256-12").symlink_to(base)
    assert to_ollama(run, tmp_path / "out", "tiny:1b").check.passed is True
    (tmp_path / "blobs" / "sha256-12").unlink()
    write_whole(base, tmp_path / "blobs" / "sha256-12", "f16", scale_norms)
    with pytest.raises(UsageError, match=r"tiny:1b"):
        to_ollama(run, tmp_path / "other", "tiny:1b")


@pytest.mark.slow
def test_a_folder_as_base(run, base, tmp_path):
    loaded = load_base(str(base), dtype="float32", device="cpu")
    loaded.model.save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    assert to_ollama(run, tmp_path / "out", tmp_path / "base").check.passed is True
    scale_norms(loaded.model)
    loaded.model.save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="norms"):
        to_ollama(run, tmp_path / "other", tmp_path / "base")


# --- the limits ------------------------------------------------------------------------------------------------------


WRONG_ADAPTERS = {
    "alpha 10 % too high": lambda name, B: B * 1.1,
    "alpha 10 % too low": lambda name, B: B * 0.9,
    "a layer is missing": lambda name, B: B * (".1." not in name),
    "q and k in another order": lambda name, B: B.flip(0) if "q_proj" in name or "k_proj" in name else B,
}


FAULTS = [f if f == "alpha 10 % too low" else pytest.param(f, marks=pytest.mark.slow) for f in WRONG_ADAPTERS]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*(pytest.param(p, marks=pytest.mark.slow) for p in ("f32", "q8_0")), "f16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_merges_are_refused(run, tmp_path, monkeypatch, fault, precision):
    original = module_merge.gguf.write_gguf_from_template

    def write(template, model, file, precision, chat_template=None):
        if "base" in file.name:
            return original(template, model, file, precision)
        model.unmerge_adapter()
        factors = {name: m.lora_B.weight for name, m in model.adapter_modules("default").items()}
        right = {name: B.data for name, B in factors.items()}
        for name, B in factors.items():
            B.data = WRONG_ADAPTERS[fault](name, B.data)
        model.merge_adapter()
        original(template, model, file, precision, chat_template)
        model.unmerge_adapter()
        for name, B in factors.items():
            B.data = right[name]
        return model.merge_adapter()

    monkeypatch.setattr(module_merge.gguf, "write_gguf_from_template", write)
    with pytest.raises(RunError, check=has_code("merge-differs")):
        export(run, "gguf", tmp_path / "out", {"merged": True, "precision": precision}, threads=1)


@pytest.mark.slow
def test_command_line(run, tmp_path):
    def slimtune_(*args: str) -> Any:
        return CliRunner().invoke(app, [*args, "--threads", "1", "--json"])

    done = slimtune_("export", str(run), "--to", "gguf", "--out", str(tmp_path / "o"))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["check"]["passed"] is True
    (tmp_path / "o" / "adapter.gguf").write_bytes((tmp_path / "o" / "adapter.gguf").read_bytes()[:2000])
    done = slimtune_("verify", str(tmp_path / "o"))
    assert done.exit_code == 1
    assert json.loads(done.stdout)["checks"][0]["passed"] is False
    assert "error: " in done.stderr


@pytest.mark.parametrize("values", [{"dtype": 7, "name": [1], "conversion": 5}, {"conversion": {"error": "x"}}])
def test_facts_of_a_wrong_type_loosen_no_comparison(tmp_path, values):
    facts = ExportManifest("vllm", tmp_path, values).read_facts()
    assert (facts.dtype, facts.name, find_nearest_lora_error_tolerance(facts)) == (None, None, None)


@pytest.mark.parametrize("error", [1e9, -1, float("nan")])
def test_a_conversion_that_loses_more_than_all_is_damaged(tmp_path, error):
    facts = ExportManifest("vllm", tmp_path, {"conversion": {"method": "loha", "error": error}}).read_facts()
    with pytest.raises(UsageError, match=r"conversion\.error"):
        find_nearest_lora_error_tolerance(facts)
