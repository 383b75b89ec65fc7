"""A run from a recipe to an adapter: what it writes, what it takes, how it goes on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from error_facts import has_code
from safetensors.torch import load_file
from tiny_run import distance, metrics, recipe_of, train_until, write_rows

from slimtune.core.config import load_recipe
from slimtune.core.data.collator import Collator
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training import checkpoint
from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import RunError, UsageError
from slimtune.evaluation.row_scores import score_supervised_rows


def test_files_and_result(whole_run):
    folder = Path(whole_run.run)
    assert whole_run.steps == 8
    assert whole_run.validation_loss < 5.45  # ln 259 = 5.56 is knowing nothing
    assert whole_run.adapter_bytes == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "adapter", "checkpoints", "metrics.jsonl", "train.log", "report.html", "result.json",
        "data.json", "fingerprint.json", ".lock",
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == to_json_dict(whole_run)
    assert len(metrics(folder, "train_loss")) == 8
    assert len(metrics(folder, "validation_loss")) == 2
    files = [p for p in folder.rglob("*") if p.is_file()]
    kinds = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".html", ".log", ".jinja", ""}
    assert {p.suffix for p in files} <= kinds
    assert not any(p.read_bytes().startswith(b"PK\x03\x04") for p in files)  # a pickle of torch
    page = (folder / "report.html").read_text()
    assert "<polyline" in page
    assert "http" not in page.replace("https://www.w3.org", "")


def test_result_agrees_with_saved_adapter(whole_run):
    loaded = load_run(whole_run.run)
    rows = tokenize_recipe_datasets(loaded.recipe, loaded.base.tokenizer)
    # Every row is trained on twice; a row's tokens are counted as they are, without padding.
    assert whole_run.trained_tokens == 2 * sum(len(e["input_ids"]) for e in rows.train)
    scores = score_supervised_rows(
        loaded.model, rows.validation, Collator(loaded.base.tokenizer.pad_token_id, with_packed_layout=True)
    )
    mean_loss = sum(s.nats for s in scores) / sum(s.tokens for s in scores)
    assert mean_loss == pytest.approx(whole_run.validation_loss, abs=1e-6)


@pytest.fixture
def contrary(settings, tmp_path):
    """Validation rows that get worse the more is learned from the training rows."""
    settings["data"]["validation"] = str(write_rows(tmp_path / "validation.jsonl", 6, answer="#?!"))
    settings["train"] |= {"learning_rate": 0.1, "epochs": 20, "eval_steps": 1}
    return settings


def test_best_adapter_is_saved(contrary):
    result = train(recipe_of(contrary, epochs=3))
    assert result.best_step < result.steps
    run = Path(result.run)
    best = load_file(run / f"checkpoints/checkpoint-{result.best_step}/adapter_model.safetensors")
    saved = load_file(run / "adapter/adapter_model.safetensors")
    assert all(torch.equal(best[k], t) for k, t in saved.items())


def test_early_stopping_ends_a_run_for_good(contrary):
    recipe = recipe_of(contrary, early_stopping_patience=2, save_steps=1)
    result = train(recipe)
    assert result.stopped_early
    assert result.steps == result.best_step + 2
    assert train(recipe, resume=True).steps == result.steps


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens_per_micro_batch": 1},
        {"packing": False, "max_tokens_per_micro_batch": 60},
        {"gradient_checkpointing": True, "mlp_tile_size": 16},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ",".join(changes),
)
def test_setting_changes_no_step(settings, tmp_path, monkeypatch, changes):
    compile_module = torch.nn.Module.compile
    # Without the C++ compiler's minute: what is captured and differentiated is the same.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **how: compile_module(m, backend="aot_eager", **how))
    settings["method"]["lora_dropout"] = 0.0
    plain = train(recipe_of({**settings, "output_dir": str(tmp_path / "plain")}, max_steps=2))
    changed = train(recipe_of(settings, max_steps=2, **changes))
    assert distance(plain.run, changed.run) < 1e-5


def test_interrupted_run_resumes_bit_for_bit(settings, whole_run, monkeypatch, capfd):
    folder = train_until(recipe_of(settings), monkeypatch, 2)
    assert [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")] == ["checkpoint-3"]
    message = capfd.readouterr().err.replace("\n", "")
    assert f"slimtune train {folder / 'recipe.yaml'} --resume" in message
    train(recipe_of(settings), resume=True)
    assert distance(folder, whole_run.run) == 0
    steps = metrics(folder, "step")
    assert steps == sorted(steps)


def test_damaged_checkpoint_is_passed_over(settings, whole_run, capfd):
    recipe = recipe_of(settings, save_steps=2)
    train(recipe)
    folder = Path(settings["output_dir"])
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"garbage")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    capfd.readouterr()
    train(recipe, resume=True)
    log = capfd.readouterr().err
    assert re.search(r"checkpoint-8 .*adapter_model\.safetensors", log)
    assert re.search(r"resum.* step 6\b", log)
    assert distance(folder, whole_run.run) == 0
    for old in checkpoint.list_checkpoints(folder / "checkpoints"):
        (old / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match="checkpoint"):
        train(recipe, resume=True)


def test_finished_run_resumes_to_the_same_result(settings, monkeypatch):
    first = train(recipe_of(settings))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "train_step", lambda *_: pytest.fail("every step is done already"))
        again = train(recipe_of(settings), resume=True)
    for name in ("steps", "validation_loss", "best_step"):
        assert getattr(again, name) == getattr(first, name)
    with pytest.raises(UsageError, match=r"train\.learning_rate: 0.01 then, 0.5 now"):
        train(recipe_of(settings, learning_rate=0.5), resume=True)


def test_init_adapter_brings_its_settings_and_resumes(settings, whole_run, tmp_path, monkeypatch):
    settings["method"] = {"name": "lora", "r": 8}
    whole = train(recipe_of({**settings, "output_dir": str(tmp_path / "whole")}), init_adapter=Path(whole_run.run))
    assert whole.validation_loss < whole_run.validation_loss
    assert "r: 4" in (tmp_path / "whole" / "recipe.yaml").read_text()
    # before the first checkpoint
    train_until(recipe_of(settings), monkeypatch, 0, KeyboardInterrupt, init_adapter=Path(whole_run.run))
    train(load_recipe(tmp_path / "run" / "recipe.yaml"), resume=True)
    assert distance(tmp_path / "run", whole.run) == 0


def test_missing_init_adapter_writes_nothing(settings, tmp_path):
    with pytest.raises(UsageError, match="nothing"):
        train(recipe_of(settings), init_adapter=tmp_path / "nothing")
    assert not Path(settings["output_dir"]).exists()


def test_kill_before_old_checkpoints_are_deleted(settings):
    """The last checkpoint is written, so no later one deletes what the killed run left."""
    recipe = recipe_of(settings, save_steps=1, save_total_limit=1)
    root = Path(settings["output_dir"]) / "checkpoints"
    train(recipe)
    kept = [p.name for p in checkpoint.list_checkpoints(root)]
    shutil.copytree(root / kept[-1], root / "checkpoint-1")
    train(recipe, resume=True)
    assert [p.name for p in checkpoint.list_checkpoints(root)] == kept


def test_full_disk_leaves_older_checkpoints(settings, monkeypatch):
    save_optimizer, calls = checkpoint.save_optimizer, []

    def full(folder, state):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_optimizer(folder, state)

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
    with pytest.raises(RunError, check=has_code("disk-full")):
        train(recipe_of(settings))
    root = Path(settings["output_dir"]) / "checkpoints"
    assert [p.name for p in root.iterdir()] == ["checkpoint-4"]
    assert checkpoint.describe_checkpoint_damage(root / "checkpoint-4") == ""
    assert not (root.parent / "adapter").exists()


def test_module_without_a_gradient_is_named(settings, capfd, monkeypatch):
    monkeypatch.setattr(
        "slimtune.core.training.training_loop.find_modules_without_gradient", lambda model: ["model.dt_proj"]
    )
    train(recipe_of(settings, max_steps=2))
    assert capfd.readouterr().err.count("model.dt_proj") == 1


def test_few_held_out_rows_and_few_steps_are_named_before_training(settings):
    settings["data"] |= {"validation": None}
    result = train(recipe_of(settings))
    log = (Path(result.run) / "train.log").read_text()
    few = "warning: 1 held-out row is too few: slimtune eval needs 6 to say whether the tuned model is better"
    assert f"{few}; --validation-fraction 0.25 sets 6 aside" in log
    assert "--epochs 8" in log
    assert result.held_out_rows == 1
    assert "--data HELD_OUT.jsonl" in (Path(result.run) / "report.html").read_text()


def test_method_without_exports_says_so_before_it_trains(settings):
    logs = {}
    for name in ("prompt_tuning", "lora"):
        settings |= {"method": {"name": name}, "output_dir": str(Path(settings["output_dir"]).parent / name)}
        logs[name] = (Path(train(recipe_of(settings, max_steps=1)).run) / "train.log").read_text()
    assert "slimtune methods" in logs["prompt_tuning"]
    assert "slimtune methods" not in logs["lora"]
