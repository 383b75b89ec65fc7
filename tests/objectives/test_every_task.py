"""Runs of every task do what runs on answers do: resume, recover memory, quantize, and train learned prompts."""

import json
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from safetensors.numpy import load_file
from tiny_run import distance, metrics, recipe_of, train_in_two_parts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from slimtune.data.tokenized_dataset import split_rows
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.setup import load_datasets
from slimtune.training.loop import TrainingLoop
from slimtune.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
WORDS = ("wave", "fern", "tram")
ROWS = {
    "pairs": [
        {"prompt": f"say {i}: ", "chosen": "abc " * (1 + i % 3), "rejected": "xyz " * (1 + i % 4)} for i in range(24)
    ],
    "rated": [
        {"prompt": f"say {i}: ", "completion": ("abc " if i % 2 else "xyz ") * (1 + i % 4), "label": i % 2 == 1}
        for i in range(24)
    ],
    "texts": [{"text": f"{word} {i}", "label": word} for i in range(8) for word in WORDS],
}
KINDS = {"dpo": "pairs", "orpo": "pairs", "reward": "pairs", "kto": "rated", "classification": "texts"}
TASKS = pytest.mark.parametrize("task", ["dpo", "kto", "reward", "classification"])


@pytest.fixture
def make(tmp_path, tiny_folder):
    """Make a recipe of a task in a run folder: `make("dpo", "run", packing=False)`."""

    def recipe(task, name, *, method=None, quantization=None, **more):
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[KINDS[task]]))
        settings = {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu", "quantization": quantization},
            "data": {"train": str(file), "validation_fraction": 0.25},
            "task": task,
            "method": method or {"name": "lora", "r": 4},
            "train": {"max_steps": 4, "batch_size": 6, "learning_rate": 1e-2, "max_tokens_per_micro_batch": 120},
            "output_dir": str(tmp_path / name),
        }
        return recipe_of(settings, **more)

    return recipe


@TASKS
def test_interrupted_run_ends_as_the_undisturbed_one(make, task, monkeypatch):
    method = {"name": "lora", "r": 4, "lora_dropout": 0.1}
    whole, again = make(task, "whole", method=method), make(task, "again", method=method)
    train(whole)
    train_in_two_parts(again, monkeypatch, 2)
    assert distance(whole.output_dir, again.output_dir) == 0


@TASKS
def test_step_that_runs_out_of_memory_is_repeated(make, task, monkeypatch):
    calm, short = make(task, "calm"), make(task, "short")
    train(calm)
    forward, train_step, calls = LlamaDecoderLayer.forward, TrainingLoop.train_step, []

    def fail(layer, *args, **kwargs):
        calls.append(layer)
        if len(calls) == 3:  # in the second micro-batch of the step, or in the second layer of a repeated one
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(layer, *args, **kwargs)

    def fail_in_step(loop, rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", fail)
            return train_step(loop, rows)

    monkeypatch.setattr(TrainingLoop, "train_step", fail_in_step)
    train(short)
    assert len(metrics(short.output_dir, "error")) == 1
    assert distance(calm.output_dir, short.output_dir) < 1e-5
    assert metrics(short.output_dir, "train_loss") == pytest.approx(metrics(calm.output_dir, "train_loss"), abs=1e-5)


@TASKS
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_learned_prompts_train_packed_as_padded(make, task, name):
    method = {"name": name, "num_virtual_tokens": 4}
    runs = [
        train(make(task, out, method=method, packing=packing))["run"] for out, packing in (("a", None), ("b", False))
    ]
    losses, padded = (metrics(run, "train_loss") + metrics(run, "validation_loss") for run in runs)
    assert losses == pytest.approx(padded, abs=1e-5)
    assert distance(*runs) < 1e-4
    evaluate(Path(runs[0]), EvalSettings(split="validation", bootstrap=20))


@TASKS
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base_learns(make, task, kind):
    run = train(make(task, "run", quantization=kind))["run"]
    losses = metrics(run, "train_loss")
    assert losses[-1] < losses[0] - 0.02
    assert evaluate(Path(run), EvalSettings(split="validation", bootstrap=20))["quantization"] == kind


def test_reference_of_a_continued_adapter_is_what_peft_computes(make, tiny_folder):
    first = train(make("orpo", "first"))["run"]
    recipe = make("dpo", "second", max_steps=1)
    train(recipe, init_adapter=Path(first))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, Path(first) / "adapter").double().eval()
    data = load_datasets(recipe, AutoTokenizer.from_pretrained(tiny_folder))
    reference = load_file(Path(recipe.output_dir) / "reference.safetensors")
    for part in ("train", "validation"):
        for example, logps in zip(getattr(data, part), reference[part], strict=True):
            for (ids, labels), logp in zip(split_rows(example), logps, strict=True):
                with torch.no_grad():
                    log_probs = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                learned = [t for t in range(1, len(ids)) if labels[t] != -100]
                assert sum(log_probs[t - 1, ids[t]].item() for t in learned) == pytest.approx(logp, abs=1e-4)
