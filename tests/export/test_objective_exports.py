"""Exports of runs on preferences: merged and in every engine they are what was trained, on rows of the run."""

import importlib.util

import pytest
from models_zoo import llama
from objective_cases import OBJECTIVE_CASES
from row_files import write_jsonl
from tiny_gguf import write_tiny_base
from tiny_run import recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.core.data.example_lengths import count_tokens_per_row
from slimtune.core.training.datasets import load_eval_dataset_and_stats
from slimtune.core.training.train import train
from slimtune.export import expected_logps as reference
from slimtune.export import gptq_rounding
from slimtune.export.expected_logps import QUESTIONS, make_fixed_and_held_out_reference_texts
from slimtune.export.exporter import export
from slimtune.export.merge import merge
from slimtune.export.verify import verify

USER, SAYS = {"role": "user"}, {"role": "assistant"}
PAIRS = [
    {"prompt": [{**USER, "content": f"Say {i}."}], "chosen": [{**SAYS, "content": "abc " * (1 + i % 3)}],
     "rejected": [{**SAYS, "content": "xyz " * (1 + i % 4)}]}
    for i in range(24)
]  # fmt: skip
RATED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
    for i, pair in enumerate(PAIRS)
]
THINKING = [
    {"messages": [{**USER, "content": f"Say {i}."}, {**SAYS, "content": "abc", "reasoning_content": f"They want {i}."}]}
    for i in range(4)
]


def write(path, rows):
    return str(write_jsonl(path, rows))


def settings(folder, base, task="dpo", dtype="float32", **data):
    rows = RATED if OBJECTIVE_CASES[task].rows == "rated" else PAIRS
    files = {"train": write(folder / "rows.jsonl", rows), "test": write(folder / "test.jsonl", rows[:3])}
    return {
        "model": {"name": str(base), "dtype": dtype, "device": "cpu"},
        "data": {**files, "validation_fraction": 0.0, **data},
        "task": task,
        "method": {"name": "lora", "r": 4},
        "train": {"max_steps": 3, "batch_size": 6, "learning_rate": 2e-2},
        "output_dir": str(folder / "run"),
    }


def texts_of(tokenizer, recipe, rows=None):
    with pytest.MonkeyPatch.context() as patch:  # the tiny tokenizer makes a token of each byte
        patch.setattr(reference, "MAX_POSITIONS", 10_000)
        found = make_fixed_and_held_out_reference_texts(tokenizer, recipe, llama().config, rows)[len(QUESTIONS) :]
    return [tokenizer.decode(text.prompt_and_answer_ids) for text in found], [text.prompt for text in found]


def test_texts_are_both_answers_of_held_out_pairs(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    found, prompts = texts_of(tokenizer, recipe_of(settings(tmp_path, tiny_folder)))
    assert len(found) == 6
    for text, prompt, word in zip(found, prompts, ("abc", "xyz") * 3, strict=True):
        assert text.startswith(prompt)
        assert word in text[len(prompt) :]


def test_rows_to_verify_on_have_the_format_of_the_run(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    names = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    rows = [{names[k]: v for k, v in row.items()} for row in PAIRS]
    files = {"train": write(tmp_path / "named.jsonl", rows), "columns": names}
    recipe = recipe_of(settings(tmp_path, tiny_folder) | {"data": files})
    assert len(texts_of(tokenizer, recipe, tmp_path / "named.jsonl")[0]) == 8


def test_texts_of_thinking_rows_are_those_of_training(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    rows = {"train": write(tmp_path / "t.jsonl", THINKING), "test": write(tmp_path / "h.jsonl", THINKING)}
    recipe = recipe_of(settings(tmp_path, tiny_folder, "sft", **rows))
    rows, _ = load_eval_dataset_and_stats(recipe.data.test, recipe.data, recipe.objective(), tokenizer)
    found, prompts = texts_of(tokenizer, recipe)
    assert found == [tokenizer.decode(row["input_ids"]) for row in rows]
    assert "<think>They want 0.</think>abc" in found[0]
    assert found[0].startswith(prompts[0])


def test_rounding_sees_the_answers_of_a_pair_as_two_rows(tiny_folder, tmp_path, monkeypatch):
    recipe = recipe_of(settings(tmp_path, tiny_folder))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    found = []
    monkeypatch.setattr(gptq_rounding, "collect_layer_inputs", lambda model, layers, rows, *_: found.extend(rows))
    gptq_rounding.record_linear_layer_inputs(model, recipe, tokenizer)
    rows, _ = load_eval_dataset_and_stats(recipe.data.train, recipe.data, recipe.objective(), tokenizer)
    assert list(map(len, found)) == [n for length in rows.example_lengths for n in count_tokens_per_row(length)]


@pytest.fixture
def gguf_base(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    """A tiny Llama as a GGUF file."""
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    return write_tiny_base(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    "task", [t for t, case in OBJECTIVE_CASES.items() if case.exports and case.rows not in ("chats", "prompts")]
)
def test_preference_run_is_the_same_in_every_engine(task, gguf_base, tmp_path, monkeypatch):
    for name, value in {"MAX_TOKENS": 48, "MAX_POSITIONS": 100, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 6}.items():
        monkeypatch.setattr(reference, name, value)
    run = train(recipe_of(settings(tmp_path, gguf_base, task))).run
    assert merge(run, tmp_path / "merged").comparison.strength == pytest.approx(1, abs=0.01)
    found = verify(run, threads=1)
    assert found.passed, found.checks
    assert len(found.checks) == 3
    for target, options in (("gguf", {}), ("gguf", {"merged": True}), ("ollama", {"name": "m"}), ("vllm", {})):
        out = tmp_path / f"{target}-{len(options)}"
        check = export(run, target, out, options, threads=1).check
        assert check.passed, check.reason
        assert check.effect > 0.01
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "gguf-0"), "--data", str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 0, done.output
