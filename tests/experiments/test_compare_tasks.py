"""Objectives compared on the same preference pairs: their names and rates, and a comparison from rows to table."""

import json

import pytest
from row_files import write_jsonl

from slimtune.errors import UsageError
from slimtune.experiments import comparison as module
from slimtune.experiments.candidates import build_candidates
from slimtune.experiments.comparison import run_comparison
from slimtune.experiments.comparison_chart import write_score_cost_chart
from slimtune.experiments.run_grid import build_comparison_grid

RECIPE = {"method": {"name": "lora", "rank": 4}, "task": {"name": "dpo", "beta": 0.2}}


def test_tasks_take_the_method_of_the_recipe_and_their_own_rates():
    overrides = {"ipo.beta": 0.5, "sft.learning_rate": 1e-3}
    found = {
        c.label: c for c in build_candidates(["dpo", "ipo", "orpo", "sft"], RECIPE, overrides, names_are_tasks=True)
    }
    assert {c.method for c in found.values()} == {"lora"}
    assert {label: c.task for label, c in found.items()} == {
        "dpo": {"name": "dpo", "beta": 0.2},
        "ipo": {"name": "dpo", "beta": 0.5, "loss_type": "ipo"},
        "orpo": {"name": "orpo"},
        "sft": {"name": "sft"},
    }
    assert found["dpo"].learning_rate == found["orpo"].learning_rate == "auto"
    assert (found["sft"].learning_rate, found["sft"].rate_source) == (1e-3, "given")


@pytest.mark.parametrize(
    ("tasks", "overrides", "message"),
    [
        (["dpp"], {}, "no task is called 'dpp', did you mean 'dpo'?"),
        (["classification"], {}, "classification does not teach a language model from preference pairs"),
        (["dpo"], {"orpo.beta": 1}, "'orpo' is neither a compared task nor a section"),
    ],
)
def test_wrong_tasks(tasks, overrides, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        build_candidates(tasks, RECIPE, overrides, names_are_tasks=True)


@pytest.mark.slow
def test_tasks_are_ranked_by_held_out_accuracy(tree, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "write_score_cost_chart", write_score_cost_chart)
    for name, start, count in (("train", 0, 24), ("test", 100, 12)):
        rows = [
            {"prompt": f"say {i}: ", "chosen": "abc " * (1 + i % 4), "rejected": "xyz " * (1 + i % 3)}
            for i in range(start, start + count)
        ]
        write_jsonl(tmp_path / f"pairs-{name}.jsonl", rows)
    tree["data"] = {n: str(tmp_path / f"pairs-{n}.jsonl") for n in ("train", "test")}
    tree["data"] |= {"validation_fraction": 0.0, "format": "preference"}
    rates = {f"{task}.learning_rate": 2e-2 for task in ("dpo", "ipo", "sft")}
    candidates = build_candidates(["dpo", "ipo", "sft"], tree, rates, names_are_tasks=True)
    grid = build_comparison_grid(
        tree, candidates, seed_count=2, tokens_per_run=None, trials=0, output_dir=tmp_path / "c"
    )
    result = run_comparison(grid)
    assert result.failed == []
    found = {line.method: line for line in result.methods}
    assert set(found) == {"dpo", "ipo", "sft"}
    for label, line in found.items():
        runs = [json.loads((tmp_path / f"c/cells/{label}-{s}/eval-test.json").read_text()) for s in (7, 8)]
        gain = line.preference.accuracy_gain
        values = {
            "accuracy_gain": gain.value,
            "margin_gain": line.preference.margin_gain.value,
            "tuned_accuracy": line.preference.tuned_accuracy,
        }
        for name, value in values.items():
            assert value == pytest.approx(sum(r["preference"][name] for r in runs) / 2), (label, name)
        assert line.tuned_loss == pytest.approx(sum(r["tuned_loss"] for r in runs) / 2)
        assert gain.low <= gain.value <= gain.high
    # Cross-entropy learns the chosen answers alone, and they become likelier.
    assert found["sft"].trained_tokens < found["dpo"].trained_tokens
    reductions = {label: line.loss_reduction.value for label, line in found.items()}
    assert reductions["sft"] > max(reductions["dpo"], reductions["ipo"])
    assert found["dpo"].preference.margin_gain.low > 0
    gains = [line.gain.value for line in result.methods]
    assert gains == sorted(gains, reverse=True)
    for pair in result.pairs:
        assert pair.difference == pytest.approx(found[pair.a].gain.value - found[pair.b].gain.value)
    table = (tmp_path / "c" / "table.md").read_text()
    assert "| task | rate |" in table
    assert "accuracy" in table
    assert "accuracy" in (tmp_path / "c" / "compare.svg").read_text()
