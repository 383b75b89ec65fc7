"""Adapters that `mlx_lm.lora` trained, wrong and right, asked for in mlx-lm itself and in a real `mlx_lm.server`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest
from fault_walk import describe_verdict
from mlx_bases import ALL_FAMILIES, save_base, train_in_mlx_lm
from safetensors.torch import load_file, save_file
from waiting import wait_until

from slimtune.export.mlx import make_config_readable_for_mlx_lm
from slimtune.export.verify import ServedPlace, check_adapter
from slimtune.generation.mlx_engine import is_mlx_lm_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_mlx_lm_installed(), reason="mlx-lm is not installed"),
]
LORA = {"num_layers": -1, "learning_rate": 4e-3, "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 0.5}}
DORA = {"fine_tune_type": "dora", "learning_rate": 2e-2, "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 3.0}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


def train(folder, family, tokenizer, **jobs):
    """Save a base, and train adapters of it by name."""
    base = save_base(family, folder / f"{family}-base", tokenizer)
    make_config_readable_for_mlx_lm(base)
    if family == "llama":  # its answers are texts
        words = [i for i in range(3, len(tokenizer)) if "!" <= tokenizer.decode([i]) <= "~"]
        weights = load_file(base / "model.safetensors")
        weights["lm_head.weight"][[i for i in range(320) if i not in words]] = 0
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    places = {name: {"model": str(base), "adapter_path": str(folder / name)} for name in jobs}
    train_in_mlx_lm([{**LORA, **job, **places[name]} for name, job in jobs.items()], folder)
    return base


class Files:
    """A base, and what mlx-lm made of it."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.base = train(folder, "llama", tokenizer, plain={}, other={"seed": 5}, dora=DORA)
        self.plain, self.other, self.dora = (folder / name for name in ("plain", "other", "dora"))

    def edit(self, adapter, name, tensors=lambda tensors: tensors, **config):
        """Copy an adapter with changes."""
        out = shutil.copytree(adapter, self.folder / name)
        file = out / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        save_file(tensors(load_file(adapter / "adapters.safetensors")), out / "adapters.safetensors")
        return out

    def scale(self, name, scale):
        return self.edit(self.plain, name, lora_parameters={**LORA["lora_parameters"], "scale": scale})

    def forget_rope_theta(self):
        """Copy the base with the config that transformers 5 writes."""
        out = shutil.copytree(self.base, self.folder / "base-of-transformers")
        file = out / "config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "rope_theta"}))
        return out


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    return Files(tmp_path_factory.mktemp("mlx"), tiny_tokenizer())


def of_last_layers(tensors):
    return {k: t for k, t in tensors.items() if ".layers.0." not in k and ".layers.1." not in k}


MLX_FAULTS = {
    # verdict, where it was reported, the adapter that is checked, what mlx-lm loads
    "scale-unsaved": ("another-scale 2", "ml-explore/mlx-examples#622", lambda f: (f.plain, f.scale("scaled", 1.0))),
    "some-layers-saved": ("partly (layer 0, layer 1)", "huggingface/peft#453",
        lambda f: (f.plain, f.edit(f.plain, "half", of_last_layers))),
    "rope-of-transformers-5": ("another-base", "ml-explore/mlx-lm#953",
        lambda f: (f.plain, f.edit(f.plain, "roped", model=str(f.forget_rope_theta())))),
    "adapter-of-before": ("another-adapter", "ml-explore/mlx-lm#229", lambda f: (f.plain, f.other)),
    "magnitudes-lost": ("another-adapter", "ml-explore/mlx-lm#1119",
        lambda f: (f.dora, f.edit(f.dora, "undirected", lambda t: {k: v for k, v in t.items() if k[-2:] != ".m"},
                                  fine_tune_type="lora"))),
}  # fmt: skip


@pytest.mark.parametrize("name", MLX_FAULTS)
def test_fault_is_named(files, name):
    cause, _, make = MLX_FAULTS[name]
    adapter, loaded = make(files)
    result = check_adapter(adapter, str(files.base), ServedPlace(mlx=loaded))
    assert (describe_verdict(result.checks[0]), result.passed) == (cause, False), result.checks[0]


@contextmanager
def serving(base, adapter, home):
    """Start `mlx_lm.server`; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "hub").mkdir(exist_ok=True)
    command = ["server", "--model", str(base), "--adapter-path", str(adapter), "--port", str(port)]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    process = subprocess.Popen([sys.executable, "-m", "mlx_lm", *command], env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers():
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(answers, seconds=120)
        yield url
    finally:
        process.kill()
        process.wait()


SERVER_FAULTS = {
    # verdict, where it was reported, the adapter of the server, the name that it is asked by
    "base-under-the-listed-name": ("not-applied", "ml-explore/mlx-lm#1745", "plain", None),
    "first-adapter-stays": ("another-base", "ml-explore/mlx-lm#229", "dora", "default_model"),
}


@pytest.mark.parametrize("name", SERVER_FAULTS)
def test_fault_of_the_server_is_named(files, tmp_path, name):
    """The release of today has the first one still: the adapter is applied under a name that is not listed."""
    cause, _, adapter, model = SERVER_FAULTS[name]
    with serving(files.base, getattr(files, adapter), tmp_path) as url:
        result = check_adapter(files.plain, str(files.base), ServedPlace(url, name=model, precision="f32"))
    assert (describe_verdict(result.checks[0]), result.passed) == (cause, False), result.checks[0]
    assert ("default_model" in result.checks[0].reason) == (model is None)


def test_adapter_of_the_server_is_applied_under_its_name(files, tmp_path):
    with serving(files.base, files.plain, tmp_path) as url:
        place = ServedPlace(url, name="default_model", precision="f32")
        verdict = check_adapter(files.plain, str(files.base), place).checks[0]
    assert (verdict.cause, verdict.evidence) == ("applied", "log-probabilities of its answers"), verdict


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_right_adapters_raise_no_alarm(tmp_path, tiny_tokenizer, family):
    train(tmp_path, family, tiny_tokenizer(), lora={}, dora=DORA)
    for kind in ("lora", "dora"):
        result = check_adapter(tmp_path / kind, place=ServedPlace(mlx=tmp_path / kind))
        assert (result.file.findings, result.passed) == ([], True), (kind, result.checks)
        # mlx-lm has another GELU for Gemma and StarCoder 2.
        assert result.checks[0].max_difference < (5e-3 if family in ("gemma", "starcoder2") else 1e-3)
