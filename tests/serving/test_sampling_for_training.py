"""Runs whose answers a server samples: the adapter that trains is what it answers with, or the run stops."""

import shutil
from dataclasses import replace

import pytest
import torch
from other_server import other_server
from row_files import write_jsonl
from serving_client import send
from tiny_run import distance, metrics, recipe_of

from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.core.training.train import train
from slimtune.errors import RunError
from slimtune.generation import http_engines, server_sampler
from slimtune.serving.openai_protocol import ApiError

pytestmark = pytest.mark.slow
FAULTY_LOAD = 3  # the adapter of step 3: that of step 1 is loaded before it


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base so wide that positions matter, and prompts."""
    folder = tmp_path_factory.mktemp("sampling")
    for part in (tiny_llama(initializer_range=0.2), tiny_tokenizer()):
        part.save_pretrained(folder / "base")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"say {i}", "wanted": 10 + i % 5} for i in range(10)])
    (folder / "rewards.py").write_text(
        "def variety(completions, **_):\n    return [len(set(t)) / 9 for t in completions]\n"
    )
    return folder


@pytest.fixture(scope="module")
def server(serve, folder):
    return serve([], base=str(folder / "base"), dtype="float32", device="cpu", adapters_from=folder, max_batch=64)


@pytest.fixture
def make(folder):
    """Make a recipe: `make("run", server.url, task={"name": "rloo"}, max_steps=3)`."""

    def recipe(name, url="", *, task=None, **train_settings):
        settings = {
            "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(folder / "prompts.jsonl"), "validation_fraction": 0.2},
            "task": {
                "name": "grpo", "rewards": [f"{folder}/rewards.py:variety"], "num_generations": 4, "temperature": 0.8,
                "max_completion_length": 8, "vllm_server_base_url": url, **(task or {}),
            },
            "method": {"name": "lora", "r": 4},
            "train": {
                "max_steps": 4, "batch_size": 3, "learning_rate": 2e-2, "forgetting_budget": None, "save_steps": 1,
            },
            "output_dir": str(folder / name),
        }  # fmt: skip
        return recipe_of(settings, **train_settings)

    return recipe


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_run_is_that_of_the_sampler_in_process(task, make, server):
    here = train(make(f"{task}-here", task={"name": task}))
    there = train(make(f"{task}-there", server.url, task={"name": task}))
    assert metrics(there.run, "reward") == metrics(here.run, "reward")
    assert max(metrics(there.run, "sampling/sampling_logp_difference/max")) < 1e-5
    assert metrics(there.run, "sampling/importance_sampling_ratio/max")[-1] == pytest.approx(1, abs=1e-4)
    assert distance(there.run, here.run) < 1e-4
    names = [model["id"] for model in send(server, "GET", "/v1/models")[1]["data"]]
    assert len([name for name in names if f"{task}-there" in name]) == 1  # adapters of earlier steps were unloaded


# --- faults of the server ---------------------------------------------------------------------------------------------


def change_weights(loader, served, change):
    parameters = [p for n, p in loader._base.model.named_parameters() if f".{served.adapter_or_base}." in n]
    assert parameters
    with torch.no_grad():
        for p in parameters:
            p.copy_(change(p))
    return served


FAULTS = {
    "missing": lambda loader, load, name, path, before: replace(load(name, path), adapter_or_base=BASE_ROW),
    "stale": lambda loader, load, name, path, before: load(name, before),
    "another": lambda loader, load, name, path, before: change_weights(loader, load(name, path), lambda p: p.flip(0)),
    "scale": lambda loader, load, name, path, before: change_weights(loader, load(name, path), lambda p: p * 2**0.5),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_adapter_is_caught_in_its_step(name, make, server, folder, monkeypatch):
    loader, loads = server.adapter_loader, []
    load, kept = loader.load, folder / f"before-{name}"

    def load_faulty(model_name, path):
        loads.append(path)
        if len(loads) == FAULTY_LOAD:
            return FAULTS[name](loader, load, model_name, path, str(kept))
        shutil.copytree(path, kept, dirs_exist_ok=True)
        return load(model_name, path)

    monkeypatch.setattr(loader, "load", load_faulty)
    recipe = make(name, server.url)
    with pytest.raises(RunError) as caught:
        train(recipe)
    assert caught.value.code == "sampler-differs"
    assert len(metrics(recipe.output_dir, "train_loss")) == FAULTY_LOAD - 1


def test_log_probabilities_at_another_temperature_are_caught(make, server, monkeypatch):
    ask, raw = server_sampler.ServerSampler._ask, {"logprobs_mode": "raw_logprobs"}

    def ask_raw(self, path, body=None):
        return ask(self, path, body | raw if path == "/v1/completions" else body)

    monkeypatch.setattr(server_sampler.ServerSampler, "_ask", ask_raw)
    with pytest.raises(RunError) as caught:
        train(make("raw", server.url))
    assert caught.value.code == "sampler-differs"


def test_server_that_goes_is_one_message_and_the_run_resumes(make, server, monkeypatch):
    loader, load, loads = server.adapter_loader, server.adapter_loader.load, []

    def load_while_up(name, path):
        loads.append(path)
        if len(loads) >= FAULTY_LOAD:
            raise ApiError(503, "loading")
        return load(name, path)

    monkeypatch.setattr(http_engines, "WAITS", (0.01,))
    monkeypatch.setattr(loader, "load", load_while_up)
    recipe = make("gone", server.url)
    with pytest.raises(RunError) as caught:
        train(recipe)
    assert (caught.value.code, "--resume" in caught.value.hint) == ("sampler-failed", True)
    monkeypatch.setattr(loader, "load", load)
    resumed = train(recipe, resume=True)
    whole = train(make("not-gone", server.url))
    assert metrics(resumed.run, "reward") == metrics(whole.run, "reward")


MODELS = (200, {"data": [{"id": "base"}]})
TEXT = (200, {"choices": [{"index": 0, "text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]})
OTHERS = {
    "no token ids": (
        {"models": MODELS, "load_lora_adapter": (200, b"Success"), "completions": TEXT},
        "return_token_ids",
    ),
    "no adapters": ({"models": MODELS}, "--adapters-from"),
    "hangs": ({"models": "hangs"}, "1 s"),
    "loading": ({"models": (503, {"error": {"message": "Loading model"}})}, "Loading model"),
    "no server": ({"models": (200, b"<html>")}, "no JSON"),
    "key": ({"models": (401, {})}, server_sampler.KEY_VARIABLE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_server_that_cannot_sample_is_refused_before_anything_is_kept(name, make, monkeypatch, folder):
    monkeypatch.setattr(http_engines, "WAITS", (0.01,))
    answers, said = OTHERS[name]
    with other_server(**answers) as url, pytest.raises(RunError) as caught:
        train(make("refused", url, task={"vllm_server_timeout": 1}))
    assert caught.value.code == "sampler-failed"
    assert said in str(caught.value)
    assert not (folder / "refused").exists()


def test_nobody_there_is_refused(make, folder):
    with pytest.raises(RunError) as caught:
        train(make("refused", "http://127.0.0.1:9"))
    assert caught.value.code == "sampler-failed"


# --- the requests -----------------------------------------------------------------------------------------------------


def test_adapters_elsewhere_are_not_read(server, folder, tmp_path):
    for path, status in ((str(tmp_path), 403), (f"{folder}/../x", 403), (str(folder / "nothing"), 404)):
        assert send(server, "POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": path})[0] == status
    assert send(server, "POST", "/v1/unload_lora_adapter", {"lora_name": "base"})[0] == 400
    assert send(server, "POST", "/v1/unload_lora_adapter", {"lora_name": "a"})[0] == 404


def test_server_without_the_folder_loads_nothing(serve, folder, make):
    run = train(make("plain", max_steps=1)).run
    plain = serve([run])
    assert send(plain, "POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": run})[0] == 404
