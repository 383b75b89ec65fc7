"""Teachers on a server: what they say is what they say here; asked once, resumed, refused with a way out."""

import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from other_server import other_server
from serving_client import send
from tiny_gguf import write_gguf
from tiny_run import distance, metrics, recipe_of, train_in_two_parts, write_rows

from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.models.loader import load_base
from slimtune.core.training.loss import compute_step_loss
from slimtune.core.training.prepare_run import prepare_run
from slimtune.core.training.train import train
from slimtune.errors import ModelError, RecipeError, RunError, UsageError
from slimtune.generation import http_engines, teacher_server
from slimtune.generation.inference_engines import (
    InProcessLlamaCppEngine,
    TransformersInferenceEngine,
    VllmClient,
    is_xllamacpp_installed,
)
from slimtune.objectives.sampled_answers import AnswerSampling

pytestmark = pytest.mark.slow
VOCABULARY = 330  # more than the teacher has


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base, a wider teacher with the same tokenizer and more padded logits, one without padding, and rows."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher = tiny_llama(hidden_size=48, initializer_range=0.2, max_position_embeddings=512)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 8)
    exact = tiny_llama(initializer_range=0.2, max_position_embeddings=512)
    exact.resize_token_embeddings(len(tiny_tokenizer()))
    base = tiny_llama(initializer_range=0.2, max_position_embeddings=512)
    for name, model in (("base", base), ("wide", teacher), ("exact", exact)):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def server(serve, folder):
    return serve([], base=str(folder / "wide"), dtype="float32", device="cpu", adapters_from=folder)


@pytest.fixture(scope="module")
def exact(serve, folder):
    return serve([], base=str(folder / "exact"), dtype="float32", device="cpu", adapters_from=folder)


@pytest.fixture
def make(folder):
    """Make a recipe: `make("run", server.url, task={"loss_top_k": 5}, max_steps=3)`."""

    def recipe(name, url="", *, base=folder / "base", task=None, **train_settings):
        teacher = {"teacher_model_server_url": url} if url else {"teacher_model_name_or_path": str(folder / "wide")}
        settings = {
            "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(folder / "rows.jsonl"), "validation_fraction": 0.2},
            "task": {"name": "distill", "max_completion_length": 8, **teacher, **(task or {})},
            "method": {"name": "lora", "r": 4, "init_lora_weights": False},
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "forgetting_budget": None},
            "output_dir": str(folder / name),
        }
        return recipe_of(settings, **train_settings)

    return recipe


def take_step(recipe):
    """Return the loss and the gradients of the first rows of a run."""
    with prepare_run(recipe) as prepared:
        rows, objective = prepared.data.train[:6], prepared.objective
        items = objective.count_items(rows)
        with using_packed_attention(prepared.model):
            loss = compute_step_loss(prepared.model, prepared.collator(rows), items, objective)
            loss.backward()
        return loss.item(), {n: p.grad for n, p in prepared.model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_the_same_teacher_loaded_here(make, server):
    here = take_step(make("here", task={"lmbda": 0, "beta": 0, "temperature": 1}))
    there = take_step(make("there", server.url, task={"loss_top_k": VOCABULARY}))
    assert there[0] == pytest.approx(here[0], abs=1e-6)
    for name, gradient in here[1].items():
        torch.testing.assert_close(there[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_run_comes_nearer_to_its_teacher_and_resumes_to_the_same_bits(make, server, monkeypatch):
    whole, again = (make(name, server.url, max_steps=8, eval_steps=1) for name in ("whole", "again"))
    assert distance(train(whole).run, train_in_two_parts(again, monkeypatch, 3).run) == 0
    found = metrics(whole.output_dir, "validation_loss")
    assert found[-1] < 0.9 * found[0]


def test_teacher_is_asked_once_for_all_runs_on_the_same_rows(make, server, monkeypatch):
    first = train(make("first", server.url, task={"loss_top_k": 3}))
    monkeypatch.setattr(teacher_server, "open_teacher_server", None)
    second = train(make("second", server.url, task={"loss_top_k": 3}))
    assert distance(first.run, second.run) == 0
    with pytest.raises(TypeError):
        train(make("third", server.url, task={"loss_top_k": 4}))


def test_killed_collection_goes_on_with_the_rows_that_are_missing(make, server, folder, monkeypatch):
    recipe, score, asked = (
        make("killed", server.url, task={"loss_top_k": 2}),
        teacher_server.HttpTeacherServer.score,
        [],
    )

    def stop_late(self, ids, start):
        asked.append(ids)
        if len(asked) == 40:
            raise KeyboardInterrupt
        return score(self, ids, start)

    monkeypatch.setattr(teacher_server.HttpTeacherServer, "score", stop_late)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    before = len(asked)
    result = train(recipe, resume=True)
    assert len(asked) - before <= 2 + 8  # a probe, and the 8 validation rows: the file of 32 training rows was there
    monkeypatch.undo()
    assert distance(result.run, train(make("not-killed", server.url, task={"loss_top_k": 2})).run) == 0


def test_teacher_writes_the_answers_itself(make, exact):
    result = train(make("written", exact.url, task={"seq_kd": True}, max_steps=12, eval_steps=1))
    found = metrics(result.run, "validation_loss")
    assert found[-1] < 0.9 * found[0]


def test_answer_of_the_teacher_with_padding_is_refused(make, server, monkeypatch):
    monkeypatch.setattr(VllmClient, "sample", lambda *_: [5, 325])
    with pytest.raises(RunError, match="token 325"):
        train(make("padding", server.url, task={"seq_kd": True}))


# --- what the server says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 7])
def test_server_says_what_the_teacher_says(start, server, folder):
    teacher = load_base(str(folder / "wide"), dtype="float32", device="cpu")
    asked = teacher_server.open_teacher_server(server.url, "", teacher.tokenizer, 5, 30)
    ids = teacher.tokenizer("say it again, say it", add_special_tokens=False)["input_ids"]
    found = asked.score(ids, start)
    expected = TransformersInferenceEngine("here", teacher.model, teacher.tokenizer).score(ids)
    np.testing.assert_array_equal(found.token_ids, expected.top_ids[start - 1 :, :5])
    np.testing.assert_allclose(found.logps, expected.top_log_probs[start - 1 :, :5], atol=1e-5)


@pytest.mark.skipif(not is_xllamacpp_installed(), reason="xllamacpp is not installed")
def test_llama_server_says_what_the_teacher_says(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])  # what write_gguf's merges make
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(vocab_size=261, head_dim=8), tokenizer)
    teacher = load_base(str(file), dtype="float32", device="cpu")
    ids = teacher.tokenizer("say it again, say it", add_special_tokens=False)["input_ids"]
    expected = teacher.model(torch.tensor([ids])).logits[0, 4:-1].double().log_softmax(-1)
    with closing(InProcessLlamaCppEngine(file, max_tokens=512, threads=1)) as engine:
        monkeypatch.setenv(http_engines.KEY_VARIABLE, engine._key)
        asked = teacher_server.open_teacher_server(engine.server.listening_address, "", teacher.tokenizer, 261, 60)
        found = asked.score(ids, 5)
        answer = asked.sample(ids, AnswerSampling("", 1, 1.0, 6, seed=3))
    found_logps = np.take_along_axis(expected.detach().numpy(), found.token_ids, 1)
    np.testing.assert_allclose(found.logps, found_logps, atol=1e-4)
    assert 1 <= len(answer) <= 6


def test_requests_for_prompts_that_make_no_sense_are_refused(server):
    body = {"model": "wide", "prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 1}
    for wrong in ({"max_tokens": 2}, {"n": 2}, {"prompt_logprobs": -1}, {"prompt": [5, 10**6]}):
        assert send(server, "POST", "/v1/completions", body | wrong)[0] == 400
    own, *others = send(server, "POST", "/v1/completions", body)[1]["choices"][0]["prompt_logprobs"]
    assert own is None
    assert all(str(token) in each for token, each in zip([6, 7], others, strict=True))
    assert send(server, "POST", "/tokenize", {"model": "wide"})[0] == 400


# --- bad input --------------------------------------------------------------------------------------------------------

MODELS = (200, {"data": [{"id": "wide"}]})
TEXT = (200, {"choices": [{"index": 0, "text": "a"}]})
OTHERS = {
    "no log-probabilities": ({"models": MODELS, "completions": TEXT}, UsageError, "no log-probabilities"),
    "chat alone": ({"models": MODELS}, UsageError, "no log-probabilities"),
    "key": ({"models": (401, {})}, UsageError, http_engines.KEY_VARIABLE),
    "loading": ({"models": (503, {"error": {"message": "Loading"}})}, RunError, "still loading"),
    "hangs": ({"models": "hangs"}, ModelError, "1 s"),
    "no server": ({"models": (200, b"<html>")}, UsageError, "lists no models"),
}


@pytest.fixture
def loads_no_base(monkeypatch):
    monkeypatch.setattr("slimtune.core.training.prepare_run.load_base_and_adapted_model", None)
    monkeypatch.setattr(http_engines, "WAITS", (0.01,))


@pytest.mark.parametrize("name", OTHERS)
def test_server_that_cannot_teach_is_refused_before_a_weight_is_loaded(name, make, folder, loads_no_base):
    answers, error, said = OTHERS[name]
    with other_server(**answers) as url, pytest.raises(error) as caught:
        train(make("refused", url, task={"teacher_server_timeout": 1}))
    assert said in str(caught.value)
    assert not (folder / "refused").exists()


def test_teacher_with_another_tokenizer_is_refused_with_the_way_out(make, serve, folder, tmp_path, loads_no_base):
    shutil.copytree(folder / "base", tmp_path / "base")
    settings = json.loads((tmp_path / "base/tokenizer.json").read_text())
    settings["model"]["vocab"] = {t: i for i, t in enumerate(reversed(settings["model"]["vocab"]))}
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(settings))
    other = serve([], base=str(tmp_path / "base"), dtype="float32", device="cpu", adapters_from=folder)
    with pytest.raises(UsageError) as caught:
        train(make("refused", other.url))
    assert (caught.value.code, "sft" in caught.value.hint) == ("teacher-failed", True)


def test_teacher_with_fewer_tokens_is_refused(make, exact, folder, tmp_path, loads_no_base):
    student = load_base(str(folder / "base"), dtype="float32", device="cpu")
    student.tokenizer.add_tokens(["<new>"])
    student.model.resize_token_embeddings(len(student.tokenizer))
    for part in (student.model, student.tokenizer):
        part.save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError) as caught:
        train(make("refused", exact.url, base=tmp_path / "larger"))
    assert caught.value.code == "teacher-failed"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"lmbda": 0.5}, "task.lmbda"),
        ({"beta": 1}, "task.beta"),
        ({"temperature": 0.9}, "task.temperature"),
        ({"teacher_model_server_url": "localhost"}, "task.teacher_model_server_url"),
        ({"teacher_model_server_url": "", "teacher_model_name_or_path": "http://a:1"}, "its own setting"),
    ],
)
def test_settings_that_a_server_excludes_are_refused(task, message, make):
    with pytest.raises(RecipeError, match=message):
        train(make("refused", "http://127.0.0.1:9", task=task))


def test_row_that_is_too_long_for_the_teacher_is_named(make, serve, folder):
    short = serve([], base=str(folder / "wide"), dtype="float32", device="cpu", adapters_from=folder, max_length=24)
    with pytest.raises(RunError, match="line "):
        train(make("refused", short.url))
