"""Plans of pairs and ranked lists: a prompt counts once, and every answer does, as in the step that trains."""

import json

import pytest
import torch
from methods.cases import CASES
from tiny_run import recipe_of
from transformers import GPT2Config, LlamaConfig

from slimtune.data.example_lengths import measure_example, resize_rows, unshare_prefix
from slimtune.planning.gpus import gpu_with_memory
from slimtune.planning.memory_trace import trace_memory
from slimtune.planning.planner import make_plan
from slimtune.planning.request import TrainingJob, build_request
from slimtune.planning.this_machine import detect_gpu
from slimtune.training.train import train

ROOMY = gpu_with_memory("8GiB")
BASES = {
    "llama": LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=128),
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}  # fmt: skip
PAIRS = ((60, 40, 30), (20, 35, 50), (0, 12, 9))
LISTS = ((70, 20, 25, 15, 30), (40, 10, 22, 18))


def test_lengths_of_examples():
    prompt = list(range(10))
    assert measure_example([[*prompt, 11, 12], [*prompt, 13]]) == (10, 2, 1)
    assert measure_example([[*prompt, 11, 12], [*prompt, 13], [*prompt[:9], 14, 15, 16]]) == (9, 3, 2, 3)
    assert measure_example([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7]]) == (0, 5, 6)  # too little to be shared
    assert unshare_prefix((10, 2, 1)) == (0, 12, 11)
    assert [resize_rows(length, lambda n: min(n, 8)) for length in (12, (10, 2, 1))] == [8, (7, 1, 1)]


def test_request_counts_every_answer_of_a_list(tiny_folder, tmp_path):
    recipe = recipe_of(
        {"model": str(tiny_folder), "data": "rows.jsonl", "task": "dpo", "train": {"batch_size": 2}, "output_dir": "x"}
    )
    lists = [(9, 5, 4, 3), (20, 1, 1), (9, 5, 5, 5, 5)]
    assert build_request(recipe, ROOMY, lists).job().lengths == ((9, 5, 5, 5, 5), (20, 1, 1))
    apart = recipe_of(recipe.model_dump(), share_prefix=False)
    assert build_request(apart, ROOMY, lists).job().lengths == ((0, 14, 14, 14, 14), (0, 21, 21))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [PAIRS, LISTS], ids=["pairs", "lists"])
@pytest.mark.parametrize(("base", "packing"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_step_takes_what_is_traced(lengths, base, packing, referee):
    def make_job():
        method = CASES["lora"](**(CASES["lora"].on_gpt2 if base == "gpt2" else {}))
        return TrainingJob(BASES[base], method, torch.float32, lengths, packing=packing)

    state, peak = referee.measured(make_job())
    trace = trace_memory(make_job())
    assert trace.state_bytes == pytest.approx(state, rel=1e-4)
    assert trace.step == pytest.approx(peak, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["all", "best-worst"])
def test_run_takes_the_tokens_that_are_planned(pairs, tiny_folder, tmp_path):
    rows = [
        {
            "prompt": f"say the word number {i}: " * (1 + i % 3),
            "responses": [f"{word} {i} " * n for word, n in (("abc", 3), ("pqr", 5), ("uvw", 2), ("xyz", 4))],
            "scores": [4, 3, 2, 1],
        }
        for i in range(12)
    ]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(tmp_path / "lists.jsonl"), "validation_fraction": 0.25},
            "task": {"name": "dpo", "pairs": pairs},
            "method": {"name": "lora", "r": 4},
            "train": {"max_steps": 1, "batch_size": 4, "max_tokens_per_micro_batch": 1},  # an example at a time
            "output_dir": str(tmp_path / "run"),
        }
    )
    train(recipe, planner=lambda *job: make_plan(build_request(job[0], detect_gpu("cpu"), job[1])).to_dict())
    record = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert record["plan"]["batch"] == (4 if pairs == "all" else 2)
    assert record["plan"]["max_tokens_per_micro_batch"] == record["probe"]["tokens"]
