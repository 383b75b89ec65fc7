"""A run from a recipe to an adapter: what it writes, what it takes, how it goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import interrupt_at, recipe_of, write_rows

import slimtune.training.train as run_module
from slimtune import PeftModel
from slimtune.config import load_recipe
from slimtune.data.collator import Collator
from slimtune.errors import DataError, RunError, UsageError
from slimtune.models.loader import load_base
from slimtune.setup import load_datasets, load_run
from slimtune.train_step.loss import evaluate_rows, mean_loss, step_loss
from slimtune.training import checkpoint
from slimtune.training.train import Interrupted, train

KEYS = {
    "run", "steps", "trained_tokens", "tokens_per_second", "train_loss", "validation_loss", "adapter_bytes",
    "trainable_params", "total_params", "peak_bytes", "load_seconds", "prepare_seconds", "supervised_tokens",
}  # fmt: skip


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = adapter(a), adapter(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_files_and_result_of_a_run(settings, tmp_path):
    result = train(recipe_of(settings))
    folder = Path(result["run"])
    assert set(result) >= KEYS
    assert result["steps"] == 8
    assert result["validation_loss"] < 5.45  # ln 259 = 5.56 is knowing nothing
    assert result["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "adapter", "checkpoints", "metrics.jsonl", "train.log", "report.html", "result.json",
        "data.json",
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "train_loss" in m] == list(range(1, 9))
    assert [m["step"] for m in metrics if "validation_loss" in m] == [4, 8]
    # Every row is trained on twice; a row's tokens are counted as they are, without padding.
    rows = load_datasets(recipe_of(settings), load_base(settings["model"]["name"], dtype="float32").tokenizer)
    assert result["trained_tokens"] == 2 * sum(len(e["input_ids"]) for e in rows.train)
    page = (folder / "report.html").read_text()
    assert "<polyline" in page
    assert "http" not in page.replace("https://www.w3.org", "")
    assert "adapted 14 modules" in page


def test_no_file_is_a_pickle(settings):
    folder = Path(train(recipe_of(settings))["run"])
    names = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert names <= {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".html", ".log", ".jinja"}
    assert not any(p.read_bytes().startswith(b"PK\x03\x04") for p in folder.rglob("*") if p.is_file())


def test_validation_loss_is_that_of_the_saved_adapter(settings):
    result = train(recipe_of(settings))
    loaded = load_run(result["run"])
    rows = load_datasets(loaded.recipe, loaded.base.tokenizer)
    collator = Collator(loaded.base.tokenizer.pad_token_id, layout=True)
    assert mean_loss(evaluate_rows(loaded.model, rows.validation, collator)) == pytest.approx(
        result["validation_loss"], abs=1e-6
    )


@pytest.fixture
def contrary(settings):
    """Validation rows that get worse the more is learned from the training rows."""
    write_rows(Path(settings["data"]["validation"]), 6, answer="#?!")
    return settings


def test_the_best_adapter_is_saved(contrary):
    result = train(recipe_of(contrary, learning_rate=0.1, epochs=3, eval_steps=1))
    assert result["best_step"] < result["steps"]
    kept = load_file(Path(result["run"]) / f"checkpoints/checkpoint-{result['best_step']}/adapter_model.safetensors")
    assert all(torch.equal(kept[k], t) for k, t in adapter(Path(result["run"])).items())


def test_early_stopping(contrary):
    result = train(recipe_of(contrary, learning_rate=0.1, epochs=20, eval_steps=1, early_stopping_patience=2))
    assert result["stopped_early"]
    assert result["steps"] == result["best_step"] + 2


def test_packing_changes_no_loss(settings):
    recipe = recipe_of(settings)
    base = load_base(settings["model"]["name"], dtype="float32")
    rows = load_datasets(recipe, base.tokenizer).train
    batches = [Collator(base.tokenizer.pad_token_id, packing=p)(rows) for p in (True, False)]
    packed, padded = (step_loss(base.model.eval(), b).item() for b in batches)
    alone = mean_loss(evaluate_rows(base.model, rows, Collator(base.tokenizer.pad_token_id, max_tokens=1)))
    assert packed == pytest.approx(padded, abs=1e-5)
    assert packed == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_micro_batches_change_no_step(settings, tmp_path, packing):
    plain = {**settings, "method": {**settings["method"], "lora_dropout": 0.0}}
    runs = {
        "one": {"batch_size": 6, "max_tokens_per_micro_batch": 4096},
        "many": {"batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens_per_micro_batch": 1},
    }
    left, right = (
        adapter(
            Path(train(recipe_of({**plain, "output_dir": str(tmp_path / n)}, max_steps=3, packing=packing, **t))["run"])
        )
        for n, t in runs.items()
    )
    assert all(torch.allclose(left[k], right[k], atol=1e-5) for k in left)


def test_an_interrupted_run_resumes_bit_for_bit(settings, tmp_path, monkeypatch, capfd):
    whole = recipe_of({**settings, "output_dir": str(tmp_path / "whole")})
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            train(recipe_of(settings))
    folder = Path(settings["output_dir"])
    assert [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")] == ["checkpoint-3"]
    said = capfd.readouterr().err
    assert "stopped at step 3" in said
    assert f"slimtune train {folder / 'recipe.yaml'} --resume" in said.replace("\n", "")
    train(recipe_of(settings), resume=True)
    assert same(folder, tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_damaged_checkpoint_is_passed_over(settings, tmp_path, capfd):
    reference = recipe_of({**settings, "output_dir": str(tmp_path / "whole")}, save_steps=2)
    train(reference)
    recipe = recipe_of(settings, save_steps=2)
    train(recipe)
    folder = Path(settings["output_dir"])
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"garbage")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    capfd.readouterr()
    train(recipe, resume=True)
    said = capfd.readouterr().err
    assert "checkpoint-8 is passed over: adapter_model.safetensors is damaged" in said
    assert "resuming at step 6" in said
    assert same(folder, tmp_path / "whole")


def test_only_damaged_checkpoints_are_an_error(settings):
    train(recipe_of(settings))
    for folder in checkpoint.list_checkpoints(Path(settings["output_dir"]) / "checkpoints"):
        (folder / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged") as e:
        train(recipe_of(settings), resume=True)
    assert e.value.exit_code == 1


def test_resuming_with_another_recipe_is_refused(settings):
    train(recipe_of(settings))
    with pytest.raises(UsageError, match=r"train\.learning_rate: 0.01 then, 0.5 now") as e:
        train(recipe_of(settings, learning_rate=0.5), resume=True)
    assert e.value.exit_code == 2


def test_a_folder_with_another_run_is_refused(settings):
    train(recipe_of(settings))
    before = {p: p.read_bytes() for p in Path(settings["output_dir"]).rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match="already contains another run") as e:
        train(recipe_of(settings))
    assert e.value.exit_code == 2
    assert {p: p.read_bytes() for p in Path(settings["output_dir"]).rglob("*") if p.is_file()} == before


def test_init_adapter_continues_training(settings, tmp_path):
    first = train(recipe_of(settings))
    on = {**settings, "output_dir": str(tmp_path / "on")}
    second = train(recipe_of(on), init_adapter=Path(first["run"]))
    assert second["validation_loss"] < first["validation_loss"]
    with pytest.raises(UsageError, match="no run folder") as e:
        train(recipe_of({**settings, "output_dir": str(tmp_path / "x")}), init_adapter=tmp_path / "nothing")
    assert e.value.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_an_error_leaves_no_run_folder(settings, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1") as e:
        train(recipe_of(settings))
    assert e.value.exit_code == 1
    assert not Path(settings["output_dir"]).exists()
    write_rows(tmp_path / "train.jsonl", 4)
    nowhere = {**settings, "method": {**settings["method"], "target_modules": ["q_prj"]}}
    with pytest.raises(UsageError, match=r"did you mean 'q_proj'") as e2:
        train(recipe_of(nowhere))
    assert e2.value.exit_code == 2
    assert not Path(settings["output_dir"]).exists()


def test_a_full_disk_leaves_the_older_checkpoints(settings, monkeypatch):
    real, calls = checkpoint.save_optimizer, []

    def full(folder, state):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(folder, state)

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
    with pytest.raises(RunError, match="the disk is full") as e:
        train(recipe_of(settings))
    assert e.value.exit_code == 1
    root = Path(settings["output_dir"]) / "checkpoints"
    assert [p.name for p in root.iterdir()] == ["checkpoint-4"]
    assert checkpoint.find_damage(root / "checkpoint-4") == ""


def test_activation_checkpointing_changes_no_adapter(settings, tmp_path):
    plain = train(recipe_of(settings, max_steps=2))
    kept = train(recipe_of({**settings, "output_dir": str(tmp_path / "c")}, max_steps=2, gradient_checkpointing=True))
    left, right = adapter(Path(plain["run"])), adapter(Path(kept["run"]))
    assert all(torch.allclose(left[k], right[k], atol=1e-6) for k in left)


def test_the_base_is_as_it_was_after_training(settings):
    base = load_base(settings["model"]["name"], dtype="float32")
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    model = run_module.attach_adapter(base, recipe_of(settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = load_datasets(recipe_of(settings), base.tokenizer).train
    step_loss(model, Collator(base.tokenizer.pad_token_id)(rows[:4])).backward()
    optimizer.step()
    assert isinstance(model, PeftModel)
    restored = model.unload()
    assert not isinstance(restored, PeftModel)
    assert all(torch.equal(p, before[n]) for n, p in restored.named_parameters())


def test_resuming_a_finished_run_trains_no_further(settings, capfd):
    first = train(recipe_of(settings))
    before = adapter(Path(first["run"]))
    again = train(recipe_of(settings), resume=True)
    assert "every step is done already" in capfd.readouterr().err
    assert again["steps"] == first["steps"]
    assert again["validation_loss"] == first["validation_loss"]
    assert all(torch.equal(t, before[k]) for k, t in adapter(Path(first["run"])).items())


def test_resuming_a_run_that_stopped_early_trains_no_further(contrary):
    recipe = recipe_of(contrary, learning_rate=0.1, epochs=20, eval_steps=1, early_stopping_patience=2, save_steps=1)
    first = train(recipe)
    assert train(recipe, resume=True)["steps"] == first["steps"]


def test_float16_is_refused(settings):
    settings["model"]["dtype"] = "float16"
    with pytest.raises(UsageError, match="float16") as e:
        train(recipe_of(settings))
    assert e.value.exit_code == 2
    assert not Path(settings["output_dir"]).exists()


def test_init_adapter_brings_its_settings_and_resumes(settings, tmp_path, monkeypatch):
    first = train(recipe_of(settings))
    other = {**settings, "method": {"name": "lora", "r": 8}}
    train(recipe_of({**other, "output_dir": str(tmp_path / "whole")}), init_adapter=Path(first["run"]))
    assert "r: 4" in (tmp_path / "whole" / "recipe.yaml").read_text()
    on = recipe_of({**other, "output_dir": str(tmp_path / "on")})
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0, KeyboardInterrupt)  # before the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(on, init_adapter=Path(first["run"]))
    train(load_recipe(tmp_path / "on" / "recipe.yaml"), resume=True)
    assert same(tmp_path / "on", tmp_path / "whole")


def test_compiled_layers_change_no_adapter(settings, tmp_path, capfd, monkeypatch):
    plain = {**settings, "method": {**settings["method"], "lora_dropout": 0.0}}
    compile_module = torch.nn.Module.compile
    # Without the C++ compiler's minute: what is captured and differentiated is the same.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    left, right = (
        adapter(Path(train(recipe_of({**plain, "output_dir": str(tmp_path / str(c))}, max_steps=1, compile=c))["run"]))
        for c in (True, False)
    )
    assert "layers will be compiled" in capfd.readouterr().err
    assert all(torch.allclose(left[k], right[k], atol=1e-5) for k in left)
