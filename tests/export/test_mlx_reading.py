"""Adapters that mlx-lm trained, read: they compute here what they compute in mlx-lm; and files that are not read."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from mlx_bases import FAMILIES, save_base, train_in_mlx_lm
from safetensors.torch import load_file, save_file

from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError
from slimtune.export.merge import rounding_embedding_scales
from slimtune.export.mlx import make_config_readable_for_mlx_lm
from slimtune.export.verify import check_adapter
from slimtune.extras.mlx_adapter import convert_mlx_adapter_to_peft, get_or_make_peft_folder, read_mlx_adapter
from slimtune.generation.inference_engines import TransformersInferenceEngine
from slimtune.generation.mlx_engine import MlxEngine, is_mlx_lm_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_mlx_lm_installed(), reason="mlx-lm is not installed"),
]
TEXT = [(7 * i * i + 3) % 250 + 3 for i in range(60)]
PARAMETERS = {"rank": 4, "dropout": 0.0, "scale": 3.0}
ENDS = {**PARAMETERS, "keys": ["self_attn.q_proj", "model.embed_tokens"]}
JOBS = {
    **{f"{family}-lora": (family, {"num_layers": -1}) for family in FAMILIES},
    **{f"{family}-dora": (family, {"num_layers": 2, "fine_tune_type": "dora"}) for family in FAMILIES},
    "qwen2-ends": ("qwen2", {"num_layers": 2, "lora_parameters": ENDS}),
    "phi3-ends": ("phi3", {"num_layers": 2, "lora_parameters": ENDS}),
    "qwen3-full": ("qwen3", {"num_layers": 1, "fine_tune_type": "full"}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_tokenizer):
    """A folder with each family's base and each job's adapter, trained in mlx-lm."""
    folder = tmp_path_factory.mktemp("mlx")
    for family in FAMILIES:
        save_base(family, folder / family, tiny_tokenizer())
        make_config_readable_for_mlx_lm(folder / family)
    jobs = [
        {"lora_parameters": dict(PARAMETERS), **job, "model": str(folder / family), "adapter_path": str(folder / name)}
        for name, (family, job) in JOBS.items()
    ]
    train_in_mlx_lm(jobs, folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if "full" not in name])
def test_adapter_of_mlx_lm_computes_the_same_here(name, trained):
    base = trained / JOBS[name][0]
    loaded = load_run(get_or_make_peft_folder(trained / name), dtype="float32", device="cpu")
    here, there = (
        TransformersInferenceEngine("here", loaded.model, loaded.base.tokenizer),
        MlxEngine(base, trained / name),
    )
    expected = there.score(TEXT).token_log_probs
    with rounding_embedding_scales(loaded.model) if there.rounds_embedding_scale else nullcontext():
        found = here.score(TEXT).token_log_probs
    with loaded.model.disable_adapter():
        effect = (here.score(TEXT).token_log_probs - found).abs().mean()
    assert effect > 0.01
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-lora", "gemma3_text-dora", "phi3-lora"])
def test_check_finds_no_fault(name, trained):
    result = check_adapter(trained / name).file
    assert (result.right, result.findings) == (True, [])
    assert result.placed == result.tensors == len(load_file(trained / name / "adapters.safetensors"))


@pytest.mark.slow
def test_commands_take_the_folder(trained, slimtune, slimtune_json, tmp_path):
    merged = slimtune_json("merge", trained / "llama-lora", "--out", tmp_path / "merged")
    assert merged["strength"] == pytest.approx(1, abs=0.01)
    assert slimtune("check", trained / "llama-lora").exit_code == 0
    exported = slimtune_json("export", trained / "qwen3-dora", "--to", "mlx", "--out", tmp_path / "out")
    assert exported["check"]["passed"]
    own, ours = read_mlx_adapter(trained / "qwen3-dora"), read_mlx_adapter(tmp_path / "out")
    assert own.modules.keys() == ours.modules.keys()
    assert all(torch.allclose(own.modules[n].a, ours.modules[n].a) for n in own.modules)


@pytest.mark.slow
def test_training_starts_from_it(trained, slimtune_json, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}: a quick brown fox"}) + "\n" for i in range(8)))
    flags = ["--data", rows, "--out", tmp_path / "run", "--init-adapter", trained / "llama-lora", "--epochs", 1]
    slimtune_json("train", trained / "llama", *flags)
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)


def edit(folder, tensors=lambda tensors: tensors, **config):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    save_file(tensors(load_file(folder / "adapters.safetensors")), folder / "adapters.safetensors")


DAMAGE = {
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "no scale": lambda f: edit(f, lora_parameters={"rank": 4}),
    "another rank": lambda f: edit(f, lora_parameters={**PARAMETERS, "rank": 8}),
    "a huge rank": lambda f: edit(f, lora_parameters={**PARAMETERS, "rank": 1 << 40}),
    "half": lambda f: edit(f, lambda t: {k: v for k, v in t.items() if not k.endswith("1.mlp.up_proj.lora_b")}),
    "another key": lambda f: edit(f, lambda t: {**t, "model.norm.weight": torch.ones(3)}),
    "experts": lambda f: edit(f, lambda t: {**t, "model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(2, 4, 3)}),
    "truncated": lambda f: (f / "adapters.safetensors").write_bytes((f / "adapters.safetensors").read_bytes()[:900]),
    "empty": lambda f: edit(f, lambda t: {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapter_is_refused(damage, trained, tmp_path):
    folder = shutil.copytree(trained / "llama-lora", tmp_path / "copy")
    DAMAGE[damage](folder)
    with pytest.raises(AdapterError):
        convert_mlx_adapter_to_peft(folder, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_whole_weights_and_a_quantized_base_are_refused(trained, tmp_path):
    with pytest.raises(AdapterError):
        get_or_make_peft_folder(trained / "qwen3-full")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "quantization": {"bits": 4}}))
    folder = shutil.copytree(trained / "llama-lora", tmp_path / "copy")
    edit(folder, model=str(base))
    with pytest.raises(AdapterError):
        get_or_make_peft_folder(folder)
