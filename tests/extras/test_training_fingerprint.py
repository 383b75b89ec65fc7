"""What a run was trained on is recorded, and what has changed since is refused, told, or cannot change a result."""

import json
import logging
import os
import shutil

import pytest
import torch
from changed_since_training import CHANGES, FORMS, USES, FolderBackup, expect
from error_facts import has_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from tiny_run import distance, recipe_of, train_until, write_rows, write_settings

from slimtune.core.config import Recipe
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError, UsageError
from slimtune.extras import base_digests
from slimtune.extras.training_fingerprint import TrainingFingerprint, compare_fingerprints, read_adapter_fingerprint

HI = torch.arange(3, 40)[None]


class Workshop:
    """A base, rows, a run that has ended and one that was stopped, in one folder; changes are undone."""

    def __init__(self, home, settings):
        self.home, self.settings = home, settings
        self.backup = FolderBackup(home)

    def locate(self, form, stopped=False):
        """Return the run as it lies there, a copy of it elsewhere, or its adapter's folder alone."""
        run = self.home / ("stopped" if stopped else "whole")
        if form == "run":
            return run
        place = self.home / form.replace(" ", "-")
        shutil.copytree(run / "adapter" if form == "adapter folder" else run, place)
        return place


@pytest.fixture(scope="module")
def built_workshop(tmp_path_factory, tiny_llama, tiny_tokenizer):
    home = tmp_path_factory.mktemp("workshop")
    settings = write_settings(home, tiny_llama, tiny_tokenizer)
    write_rows(home / "train.jsonl", 48)
    settings["data"] = {"train": str(home / "train.jsonl"), "validation_fraction": 0.125, "test_fraction": 0.25}
    settings["train"]["save_steps"] = 1
    train(recipe_of(settings))
    with pytest.MonkeyPatch.context() as patch:
        train_until(recipe_of({**settings, "output_dir": str(home / "stopped")}), patch, 3)
    return Workshop(home, settings)


@pytest.fixture
def workshop(built_workshop):
    yield built_workshop
    built_workshop.backup.restore()


@torch.no_grad()
def log_probs(path):
    return load_run(path).model(input_ids=HI).logits.log_softmax(-1)


def use_adapter(workshop, use, path, slimtune):
    """Use a run or an adapter folder as a command does; return what ended."""
    out = workshop.home / "out"
    if use == "resume":
        return slimtune("train", path / "recipe.yaml", "--resume")
    if use == "init-adapter":
        file = workshop.home / "start.yaml"
        file.write_text(Recipe.from_dict({**workshop.settings, "output_dir": str(out)}).to_yaml())
        return slimtune("train", file, "--init-adapter", path, "--max-steps", 1, "--force")
    others = write_rows(workshop.home / "others.jsonl", 12, start=500)
    rows = ("--data", others) if (path / "adapter_config.json").is_file() else ()
    command = {
        "generate": ("generate", path, "hi", "--max-new-tokens", 2),
        "chat": ("chat", path, "--max-new-tokens", 2),
        "eval": ("eval", path, *rows, "--general-text", "none"),
        "merge": ("merge", path, "--out", out),
        "export": ("export", path, "--to", "vllm", "--out", out, "--no-verify"),
        "verify": ("verify", path),
        "serve": ("serve", path, "--port", 0),
    }[use]
    return slimtune(*command, stdin="hi\n")


def what_happens(workshop, change, use, form, slimtune, caplog):
    """Change something and use an adapter of before; return "refused", "told" or "harmless"."""
    path = workshop.locate(form, stopped=use == "resume")
    before = None if use == "resume" else log_probs(path)
    change.make(workshop.home)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "slimtune"):
        done = use_adapter(workshop, use, path, slimtune)
    if "--accept-changed" in done.stderr:
        assert done.exit_code == (2 if use == "resume" else 1), done.stderr
        return "refused"
    # eval has a verdict, and llama.cpp does not know the tiny tokenizer, so that verify proves nothing.
    assert done.exit_code == 0 or use == "verify" or (use == "eval" and "error:" not in done.stderr), done.stderr
    if [r for r in caplog.records if r.module == "training_fingerprint"]:
        return "told"
    assert before is not None
    assert torch.equal(before, log_probs(path))
    return "harmless"


def make_cells():
    """Each change with each use of each form; the fast ones are an adapter that is loaded, and two runs that go on."""
    cells = []
    for change in CHANGES:
        for use in USES:
            for form in FORMS if use != "resume" else ("run", "copied run"):
                goes_on = (use, form) == ("resume", "run") and change.name in ("one value of a weight", "a row added")
                fast = goes_on or (use, form) == ("generate", "adapter folder")
                name, marks = f"{change.name}, {use}, {form}", () if fast else pytest.mark.slow
                cells.append(pytest.param(change, use, form, id=name, marks=marks))
    return cells


@pytest.mark.parametrize(("change", "use", "form"), make_cells())
def test_what_has_changed_is_refused_told_or_harmless(workshop, change, use, form, slimtune, caplog, monkeypatch):
    monkeypatch.setattr("slimtune.serving.model_server.ModelServer.run", lambda self: None)
    assert what_happens(workshop, change, use, form, slimtune, caplog) == expect(change.part, use, form)


def change(workshop, *names):
    for found in CHANGES:
        if found.name in names:
            found.make(workshop.home)


def read_metadata(file):
    with safe_open(file, "pt") as f:
        return f.metadata()


def test_record_is_in_the_run_in_each_checkpoint_and_in_the_adapter(workshop):
    run = workshop.home / "whole"
    text = (run / "fingerprint.json").read_text()
    folders = [run / "adapter", *(run / "checkpoints").iterdir()]
    assert [read_metadata(f / "adapter_model.safetensors")["training_fingerprint"] for f in folders] == [text] * 3
    assert json.loads((run / "result.json").read_text())["base_weights"] == json.loads(text)["weights"]
    assert str(workshop.home) not in text


def test_run_that_was_stopped_before_its_first_step_has_the_record(workshop, monkeypatch):
    run = train_until(recipe_of({**workshop.settings, "output_dir": str(workshop.home / "early")}), monkeypatch, 0)
    assert (run / "fingerprint.json").read_text() == (workshop.home / "whole/fingerprint.json").read_text()


@pytest.mark.parametrize("damage", [None, b"", b"{", b'{"version": 1, "weights": 3}', b'{"version": 1}'])
@pytest.mark.parametrize("name", ["result.json", "fingerprint.json"])
def test_lost_or_damaged_file_of_the_run_never_turns_the_check_off(workshop, name, damage):
    for run in ("whole", "stopped"):
        (workshop.home / run / name).unlink(missing_ok=True)
        if damage is not None:
            (workshop.home / run / name).write_bytes(damage)
    change(workshop, "one value of a weight")
    with pytest.raises(AdapterError, match="'up_proj\\.weight'", check=has_code("wrong-base")):
        load_run(workshop.home / "whole")
    with pytest.raises(UsageError, match="'up_proj\\.weight'", check=has_code("wrong-base")):
        train(recipe_of({**workshop.settings, "output_dir": str(workshop.home / "stopped")}), resume=True)


def test_all_that_differs_is_named_with_the_flag_that_accepts_it(workshop, slimtune):
    change(workshop, "one value of a weight", "rms_norm_eps in the config", "a normalizer in the tokenizer")
    run = workshop.home / "whole"
    error = slimtune("generate", run, "hi").stderr
    for part in ("'up_proj.weight'", "rms_norm_eps: 1e-06 then, 0.1 now", "normalizer", "weights,config,tokenizer"):
        assert part in error.replace("\n", " ")
    parts = ("--accept-changed", "weights,config")
    assert slimtune("generate", run, "hi", *parts).exit_code == 1
    assert slimtune("generate", run, "hi", "--max-new-tokens", 1, *parts[:1], "weights,config,tokenizer").exit_code == 0
    assert load_run(run, accept_changed=("weights", "config", "tokenizer")).recipe is not None


def test_unknown_part_and_a_flag_without_effect_are_wrong_use(workshop, slimtune):
    run = workshop.home / "whole"
    assert "'weights'" in slimtune("generate", run, "hi", "--accept-changed", "weight").stderr
    done = slimtune("train", run / "recipe.yaml", "--accept-changed", "rows")
    assert (done.exit_code, "--resume" in done.stderr) == (2, True)


def test_accepted_rows_are_trained_on_and_recorded(workshop):
    change(workshop, "a row added")
    run = workshop.home / "stopped"
    before = read_adapter_fingerprint(run / "checkpoints/checkpoint-3")
    train(recipe_of({**workshop.settings, "output_dir": str(run)}), resume=True, accept_changed=("rows",))
    after = read_adapter_fingerprint(run / "adapter")
    assert after.rows != before.rows
    assert after.to_json() == (run / "fingerprint.json").read_text()


def test_resumed_run_is_bit_for_bit_that_without_a_stop(workshop):
    run = workshop.home / "stopped"
    train(recipe_of({**workshop.settings, "output_dir": str(run)}), resume=True)
    assert distance(run, workshop.home / "whole") == 0


def test_copied_times_other_shards_and_another_dtype_are_harmless(workshop, caplog):
    base, run = workshop.home / "base", workshop.home / "whole"
    before = log_probs(run)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"part-{i}.safetensors": names[i::2] for i in range(2)}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, base / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(log_probs(run), before)
    load_run(run, dtype="bfloat16")
    assert caplog.text == ""


def test_moved_base_is_harmless(workshop):
    before, run = log_probs(workshop.home / "whole"), workshop.home / "whole"
    (workshop.home / "base").rename(workshop.home / "elsewhere")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(workshop.home / "base"), str(workshop.home / "elsewhere")))
    assert torch.equal(log_probs(run), before)


def test_run_of_an_older_version_is_not_proven_and_peft_files_are_silent(workshop, caplog):
    folder = workshop.home / "whole" / "adapter"
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    change(workshop, "one value of a weight")
    load_run(folder)
    assert caplog.text == ""
    load_run(workshop.home / "whole")
    assert [record.module for record in caplog.records] == ["training_fingerprint"]


def test_changed_value_of_a_quantized_gguf_is_refused(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])
    file = write_gguf(tmp_path / "q8.gguf", tiny_llama(vocab_size=261, head_dim=8), tokenizer, quantize=True)
    data = {"train": str(write_rows(tmp_path / "train.jsonl", 12))}
    settings = {"model": {"name": str(file), "dtype": "float32"}, "data": data, "output_dir": str(tmp_path / "run")}
    recipe = recipe_of({**settings, "method": {"name": "lora"}, "train": {"batch_size": 6, "save_steps": 1}})
    train_until(recipe, monkeypatch, 1)
    train(recipe_of({**recipe.to_dict(), "output_dir": str(tmp_path / "whole")}))
    load_run(tmp_path / "whole")
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0x40
    file.write_bytes(content)
    for path in (tmp_path / "whole", tmp_path / "whole/adapter"):
        with pytest.raises(AdapterError, check=has_code("wrong-base")):
            load_run(path)
    with pytest.raises(UsageError, check=has_code("wrong-base")):
        train(recipe, resume=True)
    start = recipe_of({**recipe.to_dict(), "output_dir": str(tmp_path / "next")})
    with pytest.raises(AdapterError, check=has_code("wrong-base")):
        train(start, init_adapter=tmp_path / "whole")


def test_pipe_in_place_of_the_adapter_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    assert read_adapter_fingerprint(tmp_path) is None


def test_peft_loads_the_file(workshop):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = workshop.home / "whole"
    model = AutoModelForCausalLM.from_pretrained(workshop.home / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, run / "adapter")(input_ids=HI).logits
    assert torch.allclose(theirs.log_softmax(-1), log_probs(run), atol=1e-5)


# --- hashes of files --------------------------------------------------------------------------------------------------


def test_weights_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_digests, "RECENT_SECONDS", -1.0)
    save_file({"layers.0.q_proj.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    first = base_digests.hash_weights_by_projection(tmp_path)
    assert list(first) == ["q_proj.weight"]
    with monkeypatch.context() as patch:
        patch.setattr(base_digests, "_hash_tensors", None)
        assert base_digests.hash_weights_by_projection(tmp_path) == first
    for damage in (b"", b"{}", b'{"file": 1, "digests": {}}'):
        for kept in (tmp_path / "cache/digests").iterdir():
            kept.write_bytes(damage)
        assert base_digests.hash_weights_by_projection(tmp_path) == first


def test_file_that_changed_a_moment_ago_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    save_file({"layers.0.q_proj.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    base_digests.hash_weights_by_projection(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_weights_replaced_under_an_older_time_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_digests, "RECENT_SECONDS", -1.0)
    file = tmp_path / "model.safetensors"
    save_file({"layers.0.q_proj.weight": torch.ones(4, 4)}, file)
    first, stat = base_digests.hash_weights_by_projection(tmp_path), file.stat()
    save_file({"layers.0.q_proj.weight": torch.zeros(4, 4)}, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert base_digests.hash_weights_by_projection(tmp_path) != first


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(base_digests, "RECENT_SECONDS", -1.0)
    monkeypatch.setenv("SLIMTUNE_CACHE", "/dev/null/nowhere")
    save_file({"layers.0.q_proj.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert base_digests.hash_weights_by_projection(tmp_path)


def test_fields_that_one_side_lacks_are_not_compared():
    before = TrainingFingerprint(config={"rms_norm_eps": "1e-06"}, weights={"lm_head.weight": "1"}, template="1")
    assert compare_fingerprints(before, TrainingFingerprint(config={"new_field": 1}, weights={})) == []
    assert TrainingFingerprint.from_json(before.to_json()) == before
