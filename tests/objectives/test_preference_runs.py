"""Runs on preference pairs: packed as padded, resumed as undisturbed, and what a run writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_families import build_family
from tiny_run import distance, interrupt_at, metrics, recipe_of, train_in_two_parts

from slimtune import LoraConfig, get_peft_model
from slimtune.attention.register import packed_attention
from slimtune.data.collator import Collator
from slimtune.errors import DataError, RunError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.objectives import objective_class
from slimtune.train_step.loss import forward_backward, make_collator, score_objective, score_row_logps
from slimtune.training.train import Interrupted, train


@pytest.fixture
def settings(tmp_path, tiny_folder):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say the word number {i}"}],
            "chosen": [{"role": "assistant", "content": "abc " * (1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "xyz " * (1 + i % 4)}],
        }
        for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "validation_fraction": 0.25},
        "task": "dpo",
        "method": {"name": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "max_tokens_per_micro_batch": 200},
        "output_dir": str(tmp_path / "run"),
    }


def test_dpo_run_learns_and_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    whole = train(recipe_of(settings))
    folder = Path(whole["run"])
    assert metrics(folder, "train_loss")[0] == pytest.approx(np.log(2), abs=0.1)  # dropout alone makes a difference
    assert whole["validation_loss"] < 0.6
    assert metrics(folder, "rewards/accuracies")[-1] == 1
    assert metrics(folder, "rewards/margins")[-1] > 0.2
    reference = load_file(folder / "reference.safetensors")
    assert (reference["train"].shape, reference["validation"].shape) == ((18, 2), (6, 2))

    found = evaluate(folder, EvalSettings(split="validation"))
    preference = found["preference"]
    assert found["rows"] == preference["pairs"] == preference["pairs_better"] == 6
    assert preference["margin_gain_ci95"][0] > 0
    assert found["improved"]
    assert found["prompt_dependence"] is None
    gain = preference["tuned_margin"] - preference["base_margin"]
    assert metrics(folder, "rewards/margins")[-1] == pytest.approx(0.1 * gain, rel=1e-4)  # beta times the log ratios
    page = (folder / "report.html").read_text()
    assert "Preference margin" in page
    assert "dpo, beta 0.1" in page

    again = recipe_of({**settings, "output_dir": str(tmp_path / "again")})
    train_in_two_parts(again, monkeypatch, 4)
    assert distance(folder, again.output_dir) == 0


def test_reference_of_other_rows_is_refused(settings, monkeypatch):
    settings["data"]["validation_fraction"] = 0.0  # a run without validation rows has a reference, too
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        train(recipe_of(settings))
    path = Path(settings["data"]["train"])
    path.write_text(path.read_text().replace("abc", "abd"))
    with pytest.raises(RunError, match="log-probabilities of other rows"):
        train(recipe_of(settings), resume=True)


def test_sft_learns_the_chosen_answers_of_pairs_if_their_format_is_named(settings, tmp_path):
    path = Path(settings["data"]["train"])
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = tmp_path / "chosen.jsonl"
    chosen.write_text("".join(json.dumps({"messages": p["prompt"] + p["chosen"]}) + "\n" for p in pairs))
    sft = {**settings, "task": "sft"}
    with pytest.raises(DataError, match="does not learn from them") as refused:
        train(recipe_of(sft))
    assert "--format preference" in refused.value.hint
    named = train(recipe_of({**sft, "data": {**settings["data"], "format": "preference"}}))
    rows = {**sft, "data": {**settings["data"], "train": str(chosen)}, "output_dir": str(tmp_path / "rows")}
    assert distance(named["run"], train(recipe_of(rows))["run"]) == 0
    found = evaluate(Path(named["run"]), EvalSettings(split="validation", bootstrap=50))
    assert found["preference"]["pairs"] == 6
    scores = json.loads(Path(named["run"], "scores-validation.json").read_text())
    margins = [row["tuned_margin"] for row in scores]
    assert np.mean(margins) == pytest.approx(found["preference"]["tuned_margin"])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["simpo", "orpo"])
def test_objectives_without_a_reference(settings, task):
    result = train(recipe_of({**settings, "task": task}))
    assert metrics(result["run"], "rewards/accuracies")[-1] == 1
    assert not Path(result["run"], "reference.safetensors").exists()


@pytest.mark.slow
def test_reference_is_the_adapter_that_training_continues_from(settings, tmp_path):
    first = train(recipe_of(settings))
    second = train(
        recipe_of({**settings, "output_dir": str(tmp_path / "second")}, max_steps=1), init_adapter=Path(first["run"])
    )
    assert metrics(second["run"], "train_loss")[0] == pytest.approx(np.log(2), abs=0.1)


def make_pairs(vocab: int = 96) -> list[dict]:
    rng = np.random.default_rng(0)
    pairs = []
    for i, (prompt, *answers) in enumerate([(12, 5, 9), (9, 7, 3), (15, 2, 11)]):
        shared = rng.integers(3, vocab, prompt).tolist()
        rows = [shared + rng.integers(3, vocab, n).tolist() for n in answers]
        labels = [t for row in rows for t in [-100] * prompt + row[prompt:]]
        ids = [t for row in rows for t in row]
        pairs.append({"input_ids": ids, "labels": labels, "line": i, "row_lengths": [*map(len, rows)]})
    return pairs


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_packed_and_shared_equal_padded(family, task):
    model = get_peft_model(
        build_family(family).float(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    objective, pairs = objective_class(task)(), make_pairs()
    packed, padded = make_collator(model, 0, max_tokens=48), Collator(0, packing=False)
    assert packed.share_prefix
    assert packed(pairs[:1])["input_ids"].shape[1] == 12 + 5 + 9
    found = []
    for collator in (packed, padded):
        with model.disable_adapter():
            reference = score_row_logps(model, pairs, collator)
        rows = [pair | {"reference": reference[i]} for i, pair in enumerate(pairs)]
        model.train().zero_grad()
        loss = run_step(model, collator, objective, rows)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        scores = score_objective(model, rows, collator, objective)
        found.append((reference, loss.item(), scores, gradients))
    (reference, loss, scores, gradients), (other_reference, other_loss, other_scores, other_gradients) = found
    assert loss == pytest.approx(other_loss, abs=1e-5)
    for i in range(len(pairs)):
        assert reference[i] == pytest.approx(other_reference[i], rel=1e-5)
        assert scores[i] == pytest.approx(other_scores[i], rel=1e-4, abs=1e-5)
    assert gradients
    for name, gradient in gradients.items():
        scale = other_gradients[name].abs().max()
        torch.testing.assert_close(gradient, other_gradients[name], atol=1e-5 * float(scale) + 1e-7, rtol=1e-4)


def run_step(model, collator, objective, rows):
    with packed_attention(model):
        return forward_backward(
            model, collator.make_micro_batches(rows), objective=objective, num_items=objective.count_items(rows)
        )


def test_settings_of_dpo_are_checked(settings):
    with pytest.raises(UsageError, match=r"label_smoothing is 0\.1, and loss_type sigmoid has none"):
        recipe_of({**settings, "task": {"name": "dpo", "label_smoothing": 0.1}})
    with pytest.raises(UsageError, match=r"data\.format: got 'chat', and task is dpo"):
        recipe_of({**settings, "data": {**settings["data"], "format": "chat"}})
    del settings["train"]["learning_rate"]
    assert recipe_of(settings).resolve_learning_rate(steps=8, hidden_size=64).train.learning_rate == 2e-5
