"""How much of the held-out gain is left in few bits: measured in llama.cpp, refused below a share, never guessed."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_facts import has_code
from hand_run import save_adapter_of
from row_files import write_jsonl
from tiny_gguf import write_tiny_base
from tiny_run import recipe_of, write_rows

import slimtune
from slimtune.core.config.recipe import load_recipe
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import RunError, UsageError
from slimtune.evaluation.statistics import bootstrap_share
from slimtune.export import expected_logps, gptq_rounding, kept_gain
from slimtune.export.exporter import export
from slimtune.export.manifest import read_export_manifest
from slimtune.export.merge import load_run_for_export, record_second_moments_by_gguf_name
from slimtune.export.verify import verify

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_tokenizer) -> dict[str, Path]:
    """A run that learned what its held-out rows say, and an adapter without a run."""
    home, patch = tmp_path_factory.mktemp("kept"), pytest.MonkeyPatch()
    patch.setenv("SLIMTUNE_CACHE", str(home / "cache"))
    base = write_tiny_base(home / "base.gguf", tiny_llama, tiny_tokenizer)
    settings: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(write_rows(home / "train.jsonl", 24)),
                 "test": str(write_rows(home / "test.jsonl", 6, start=100))},
        "method": {"name": "lora", "r": 4},
        "train": {"epochs": 3, "batch_size": 6, "learning_rate": 2e-2, "forgetting_budget": None},
        "output_dir": str(home / "run"),
    }  # fmt: skip
    train(recipe_of(settings))
    config = slimtune.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    yield {"run": home / "run", "adapter": save_adapter_of(base, home / "adapter", config)}
    patch.undo()


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    for name, value in {"MAX_TOKENS": 32, "MAX_POSITIONS": 40, "MAX_ANSWERS": 1, "ANSWER_TOKENS": 2}.items():
        monkeypatch.setattr(expected_logps, name, value)
    monkeypatch.setattr(kept_gain, "MAX_TOKENS", 40)


def to_gguf(run: Path, out: Path, **options: Any) -> Any:
    return export(run, "gguf", out, {"merged": True, **options}, threads=1)


@pytest.mark.slow
def test_share_is_that_of_the_losses_and_verify_says_the_same(runs, tmp_path):
    found = to_gguf(runs["run"], tmp_path / "out", precision="q8_0")
    kept = found.check.kept_gain
    gain = kept.base_loss - kept.tuned_loss
    assert gain > 0.1
    assert kept.share == pytest.approx((kept.base_loss - kept.shipped_loss) / gain)
    assert kept.share_ci95[0] <= kept.share <= kept.share_ci95[1]
    assert kept.share == pytest.approx(1, abs=0.05)
    assert kept.rounded_base_loss == pytest.approx(kept.base_loss, abs=0.05)
    assert read_export_manifest(tmp_path / "out").values["min_kept"] == 0.9
    checked = verify(tmp_path / "out", threads=1)
    assert checked.passed
    assert checked.checks[0].kept_gain == kept


@pytest.mark.slow
def test_too_small_a_share_is_refused_with_the_ways_out_and_nothing_is_left(runs, tmp_path, monkeypatch):
    real = kept_gain.sum_supervised_nats

    def sum_nats(engine, rows, what):  # few bits cost a tiny model nothing: half a nat is added here
        return [nats + 0.5 * (what == "rows for llama.cpp") for nats in real(engine, rows, what)]

    monkeypatch.setattr(kept_gain, "sum_supervised_nats", sum_nats)
    with pytest.raises(RunError, check=has_code("merge-differs")) as refused:
        to_gguf(runs["run"], tmp_path / "out", precision="q4_0", min_kept=1.0)
    ways_out = str(refused.value.hint)
    for command in ("--to gguf;", "--precision q8_0;", "method.qat=Q4_0;", "--min-kept 0"):
        assert command in ways_out
    assert list(tmp_path.iterdir()) == []
    taken = to_gguf(runs["run"], tmp_path / "out", precision="Q4_0", min_kept=0.0)
    assert taken.check.passed is True
    assert taken.check.kept_gain.share < 1
    assert verify(tmp_path / "out", threads=1).passed, "what was accepted at export"


def test_few_bits_are_rounded_with_the_runs_rows_unless_it_is_left_out(runs, tmp_path):
    """`--without-rows` gives llama.cpp's bytes; by default only the matrices of the layers differ from these."""
    tensors, facts = {}, {}
    for way, rows in (("default", None), ("asked", True), ("without", False)):
        found = export(
            runs["run"], "gguf", tmp_path / way, {"merged": True, "precision": "Q4_0", "with_rows": rows},
            verify=False,
        )  # fmt: skip
        tensors[way] = {t.name: t.data for t in gguf.GGUFReader(tmp_path / way / "model.gguf").tensors}
        facts[way] = found.facts["matrices_rounded_with_rows"]
    assert facts == {"default": 14, "asked": 14, "without": 0}
    assert all(np.array_equal(tensors["default"][name], data) for name, data in tensors["asked"].items())
    changed = {name for name, data in tensors["without"].items() if not np.array_equal(tensors["default"][name], data)}
    assert len(changed) == 14
    assert all(name.startswith("blk.") for name in changed)


def test_rounding_with_rows_is_refused_where_there_are_none(runs, tmp_path):
    for run, options in (
        (runs["adapter"], {"precision": "Q4_0"}),
        (runs["run"], {"precision": "q8_0"}),
        (runs["run"], {"precision": "Q4_0", "imatrix": True}),
    ):
        with pytest.raises(UsageError, match="with-rows"):
            to_gguf(run, tmp_path / "out", with_rows=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_have_no_known_names_is_rounded_by_llama_cpp(runs, monkeypatch):
    loaded = load_run_for_export(runs["run"])
    assert len(record_second_moments_by_gguf_name(loaded)) == 14
    monkeypatch.setattr("slimtune.export.gguf.ARCHITECTURES", {})
    assert isinstance(record_second_moments_by_gguf_name(loaded), str)


def test_rows_that_the_run_set_aside_are_held_out_and_decide_no_rounding(runs, tmp_path, monkeypatch):
    recipe = load_recipe(runs["run"] / "recipe.yaml", {"output_dir": str(tmp_path / "run"), "train.max_steps": 2,
                         "data.test": None, "data.test_fraction": 0.25})  # fmt: skip
    train(recipe)
    loaded, learned = load_run(tmp_path / "run", device="cpu"), []
    held_out = kept_gain.list_held_out_rows(loaded, None).texts
    assert 1 < len(held_out) <= 6  # as many as have `MAX_TOKENS`
    assert all(any(row.supervised) for row in held_out)
    monkeypatch.setattr(gptq_rounding, "collect_second_moments", lambda model, layers, rows: learned.extend(rows) or {})
    record_second_moments_by_gguf_name(loaded)
    assert len(learned) > 10
    assert not any(row.input_ids in learned for row in held_out), "they judge the rounding"


@pytest.mark.slow
def test_gain_on_pairs_is_that_of_the_objectives_loss(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_gain, "MAX_TOKENS", 400)
    pairs = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [
            {"prompt": f"say {i}", "chosen": "abc " * (1 + i % 3), "rejected": "xyz " * (1 + i % 4)} for i in numbers
        ])
        for name, numbers in {"train": range(24), "validation": range(100, 106)}.items()
    }  # fmt: skip
    recipe = load_recipe(runs["run"] / "recipe.yaml", {"output_dir": str(tmp_path / "dpo"), "task": "dpo",
                         "data.test": None, "data.train": str(pairs["train"]),
                         "data.validation": str(pairs["validation"])})  # fmt: skip
    trained = train(recipe)
    kept = to_gguf(tmp_path / "dpo", tmp_path / "out", precision="q8_0").check.kept_gain
    assert kept.rows == 6
    assert kept.base_loss == pytest.approx(math.log(2))
    assert kept.tuned_loss == pytest.approx(trained.validation_loss, abs=1e-4)
    assert kept.share == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_without_held_out_rows_nothing_is_said_to_be_kept(runs, tmp_path):
    found = to_gguf(runs["adapter"], tmp_path / "out", precision="q8_0")
    kept = to_json_dict(found)["check"]["kept_gain"]
    assert (kept["share"], kept["rows"], kept["reason"] != "") == (None, 0, True)
    assert found.check.kept_gain.reason in "".join(found.lines())
    with pytest.raises(RunError):
        export(
            runs["adapter"], "gguf", tmp_path / "proof", {"merged": True, "precision": "q8_0"},
            threads=1, require_proof=True,
        )  # fmt: skip
    assert not (tmp_path / "proof").exists()


@pytest.mark.slow
def test_sixteen_bits_are_not_measured(runs, tmp_path):
    assert to_gguf(runs["run"], tmp_path / "out").check.kept_gain is None
    assert "min_kept" not in json.loads((tmp_path / "out" / "export_manifest.json").read_text())


@pytest.mark.parametrize("options", [{"min_kept": 1.5, "precision": "q8_0"}, {"min_kept": 0.8}, {"min_kept": -0.1}])
def test_wrong_least_shares(runs, options, tmp_path):
    with pytest.raises(UsageError, match="--min-kept"):
        to_gguf(runs["run"], tmp_path / "out", **options)


def test_interval_of_a_share_covers_the_truth():
    draws, covered = np.random.default_rng(0), 0
    for _ in range(100):
        wholes = draws.gamma(2.0, 1.0, 60) - 0.3
        found = bootstrap_share(wholes * 0.8 + draws.normal(0, 0.3, 60), wholes, draws=400)
        covered += found.low <= 0.8 <= found.high
    assert 88 <= covered <= 99
    assert bootstrap_share([1.0, 2.0], [2.0, 4.0]).ci95 == (0.5, 0.5)
    with pytest.raises(ValueError):
        bootstrap_share([1.0], [-1.0])
