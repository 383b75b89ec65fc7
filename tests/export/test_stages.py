"""`verify --stages` names the first stage that differs: a fault is put into each stage of a run that learned."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from engine_dialects import serving
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_gguf import write_tiny_base
from tiny_run import recipe_of, settings_of_base

from slimtune.core.training.train import train
from slimtune.errors import UsageError
from slimtune.export import expected_logps
from slimtune.export.merge import load_run_for_export, merge, write_merged_gguf
from slimtune.export.stages import MERGED, RELOADED, SAVED_FILE, StageFiles
from slimtune.export.verify import ServedPlace, verify
from slimtune.extras.gguf_loading import load_gguf

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    home, patch = tmp_path_factory.mktemp("stages"), pytest.MonkeyPatch()
    patch.setenv("SLIMTUNE_CACHE", str(home / "cache"))
    patch.setattr("slimtune.export.stages.is_mlx_lm_installed", lambda: False)
    for name, value in {"MAX_TOKENS": 32, "MAX_POSITIONS": 60, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 2}.items():
        patch.setattr(expected_logps, name, value)
    base = write_tiny_base(home / "base.gguf", tiny_llama, tiny_tokenizer, initializer_range=0.1)
    train(recipe_of(settings_of_base(base, home, device="cpu")))
    yield home / "run"
    patch.undo()


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(trained, tmp_path / "run")


def find_stage(run, **files):
    report = verify(run, stages=StageFiles(**files), threads=1)
    for check in report.checks:
        assert check.passed is (check.engine != report.first_difference), check
    if report.first_difference is not None:
        assert report.checks[-1].reason
    return report.first_difference, report.checks[-1]


def edit_adapter(run, change):
    file = run / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: change(k, v) for k, v in load_file(file).items()}, file, metadata)


def test_no_stage_of_a_right_run_differs(run):
    stage, last = find_stage(run)
    assert (stage, last.engine) == (None, "llama.cpp")


def test_altered_file(run):
    edit_adapter(run, lambda name, value: value * 0.5 if "lora_B" in name else value)
    stage, check = find_stage(run)
    assert stage == SAVED_FILE
    assert check.tokens


def test_altered_file_without_its_checkpoint(run):
    """The validation loss that the trainer measured says it."""
    shutil.rmtree(run / "checkpoints")
    edit_adapter(run, lambda name, value: value * 0.5 if "lora_B" in name else value)
    assert find_stage(run)[0] == SAVED_FILE


def test_altered_scale_in_the_config(run):
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 3}))
    stage, check = find_stage(run)
    assert stage == SAVED_FILE
    assert "lora_alpha" in check.reason


def test_reader_that_ignores_the_file(run, monkeypatch):
    import peft

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda base, folder: base)
    assert find_stage(run)[0] == RELOADED


def test_another_scale_at_the_merge(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    edit_adapter(other, lambda name, value: value * 0.5 if "lora_B" in name else value)
    merge(other, tmp_path / "merged")
    stage, check = find_stage(run, merged=tmp_path / "merged")
    assert (stage, check.cause) == (MERGED, "another-scale")
    assert check.scale == pytest.approx(0.5, rel=0.05)


def test_fewer_bits_than_said(run, tmp_path):
    write_merged_gguf(load_run_for_export(run), run, tmp_path / "model.gguf", "Q4_0")
    stage, check = find_stage(run, gguf=tmp_path / "model.gguf", precision="q8_0")
    assert stage == "quantized, q8_0"
    assert "mostly q4_0" in check.reason


def test_engine_with_another_base_or_template(run, tmp_path, tiny_llama, tiny_tokenizer):
    write_merged_gguf(load_run_for_export(run), run, tmp_path / "model.gguf", "f32")
    model, tokenizer = load_gguf(tmp_path / "model.gguf")
    other = tiny_llama(seed=7, vocab_size=261, head_dim=8, initializer_range=0.1)
    for served, rendered, cause in ((other, None, "another-base"), (model, "### {}\n", "another-template")):
        with serving({"tuned": served}, tokenizer, "vllm", template=rendered or "<|im_start|>user\n{}") as url:
            place = ServedPlace(url, name="tuned", precision="f32")
            stage, check = find_stage(run, place=place)
        assert (stage, check.cause) == (url, cause)


def test_stages_of_an_export_are_those_of_its_run(run, tmp_path, slimtune):
    merge(run, tmp_path / "merged")
    assert slimtune("verify", tmp_path / "merged", "--stages").exit_code == 2
    with pytest.raises(UsageError):
        verify(run, stages=StageFiles(precision="q0_9"), threads=1)
