"""`slimtune push`: the adapter, a card with what is known, and nothing else; loaded back, it answers the same."""

import json
import os
import re
import shutil
import subprocess
import sys
import traceback

import pytest
import torch
import yaml
from hand_run import make_run
from hub_server import TOKEN, serve_hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from slimtune.adapters.model import PeftModel
from slimtune.cli import app
from slimtune.errors import AdapterError, ModelError, RunError, UsageError
from slimtune.export.hub import push
from slimtune.export.manifest import write_manifest
from slimtune.export.merge import merge
from slimtune.run_dir import write_json
from slimtune.setup import load_run

EVAL = {
    "split": "test", "data": "/home/ada/rows/held.jsonl", "rows": 93, "tokens": 5000, "base_loss": 4.52,
    "tuned_loss": 3.73, "loss_reduction": 0.79, "loss_reduction_ci95": [0.72, 0.89],
}  # fmt: skip
RESULT = {
    "rows": 779, "steps": 24, "epochs": 0.245, "supervised_tokens": 9699, "validation_loss": 3.898,
    "total_params": 139_399_488, "peak_bytes": 2**31, "dtype": "bfloat16", "device": "cpu",
}  # fmt: skip
PLAN = {"plan": {"need_bytes": {"low": 2**30, "high": 3 * 2**30}}, "probe": {"bytes": 2**30 + 2**29}}


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def run(tmp_path, tiny_folder):
    """A run with everything that training leaves in it."""
    run = make_run(tmp_path / "my run", tiny_folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(run / "adapter")
    write_json(run / "result.json", RESULT)
    write_json(run / "plan.json", PLAN)
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "train.log").touch()
    shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-3")
    return run


def get_files(hub, repo_id="ada/words") -> dict[str, bytes]:
    return {n: c for n, c in hub.repos[repo_id].files().items() if n != ".gitattributes"}


def get_card(hub, repo_id="ada/words") -> str:
    return get_files(hub, repo_id)["README.md"].decode()


def get_metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_only_the_adapter_and_its_card_are_uploaded(hub, run, tmp_path):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = push(run, "ada/words", token=TOKEN)
    files = get_files(hub)
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | tokenizer
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, f"{name} contains a local path"
        assert TOKEN.encode() not in content, name
    assert (result["repo_id"], result["url"], result["kind"]) == ("ada/words", f"{hub.url}/ada/words", "adapter")
    assert (result["private"], result["revision"]) == (False, "main")
    assert result["created"]
    assert result["committed"]
    assert result["commit"] == hub.repos["ada/words"].sha()
    assert result["files"] == {n: len(c) for n, c in files.items()}
    assert result["bytes"] == sum(map(len, files.values()))
    assert hub.repos["ada/words"].branches["main"][-1][0] == "lora adapter for tiny-base"
    assert TOKEN not in json.dumps(result, default=str)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, "the run folder is unchanged"


def test_the_card_contains_the_results_of_the_run(hub, run):
    write_json(run / "eval-test.json", EVAL)
    result = push(run, "ada/words", token=TOKEN, base="ada/tiny")
    card = get_card(hub)
    assert result["eval_file"] == "eval-test.json"
    assert json.loads(get_files(hub)["adapter_config.json"])["base_model_name_or_path"] == "ada/tiny"
    metadata = get_metadata(card)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("ada/tiny", "adapter")
    assert {"slimtune", "lora", "base_model:adapter:ada/tiny"} <= set(metadata["tags"])
    for text in (
        "| data | `my run-rows.jsonl`, 779 rows; 9699 supervised tokens |",
        "`held.jsonl`, 93 rows: loss 4.520 before, 3.730 after; lower by 0.790, 95 % interval 0.720 to 0.890",
        "24 steps, 0.245 epochs, learning rate 0.0002, batches of 8 rows, seed 42, base in bfloat16",
        "planned 1.0 GiB to 3.0 GiB; the longest micro-batch took 1.5 GiB; the run took at most 2.0 GiB on cpu",
        "vllm serve ada/tiny --enable-lora --max-lora-rank 8 --lora-modules words=ada/words",
        '"r": 4',
    ):
        assert text in card


def test_without_an_evaluation_the_card_shows_the_validation_loss(run):
    result = push(run, "ada/words", dry_run=True)
    assert result["eval_file"] == "result.json"
    assert "loss 3.898 nats per token on the validation rows; the base was not measured" in result["card"]


def test_a_run_without_results(run):
    (run / "result.json").unlink()
    (run / "plan.json").unlink()
    result = push(run, "ada/words", dry_run=True)
    assert result["eval_file"] is None
    assert "| held-out rows | not measured |" in result["card"]
    assert "| memory |" not in result["card"]


def test_a_dry_run_sends_nothing(hub, run):
    result = push(run, "ada/words", dry_run=True)
    assert hub.requests == []
    assert result["card"].startswith("---\n")
    assert "url" not in result


def test_a_base_without_hub_id_is_noted(hub, run, caplog):
    result = push(run, "ada/words", token=TOKEN)
    config = json.loads(get_files(hub)["adapter_config.json"])
    assert config["base_model_name_or_path"] == result["base"] == "tiny-base"
    assert not {"base_model", "license"} & set(get_metadata(get_card(hub)))
    assert "| licence of the base | unknown |" in get_card(hub)
    assert any("--base ORG/NAME" in n for n in result["notes"])
    assert any("licence" in n for n in result["notes"])
    assert result["notes"] == [r.message for r in caplog.records if r.name == "slimtune.export.hub"]


def test_the_licence_of_a_local_base(hub, run, tiny_folder):
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: words-1\nlicense_link: x\n---\n")
    card = push(run, "ada/words", dry_run=True, base="ada/tiny")["card"]
    assert "| licence of the base | words-1 (from its model card) |" in card
    expected = {"license": "other", "license_name": "words-1", "license_link": "x"}
    assert {k: v for k, v in get_metadata(card).items() if "license" in k} == expected


def test_the_licence_of_a_base_on_the_hub(hub, run):
    hub.make("engines/tiny", **{"README.md": b"---\nlicense: mit\n---\n"})
    assert get_metadata(push(run, "ada/words", dry_run=True, base="engines/tiny")["card"])["license"] == "mit"


@pytest.mark.real
def test_an_alias_is_replaced_by_the_hub_id(smollm2_folder, tmp_path):
    run = make_run(tmp_path / "run", smollm2_folder)
    recipe = (run / "recipe.yaml").read_text().replace(str(smollm2_folder), "smollm2-135m")
    (run / "recipe.yaml").write_text(recipe)
    result = push(run, "ada/words", dry_run=True)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result["base"] == get_metadata(result["card"])["base_model"] == name
    assert get_metadata(result["card"])["license"] == "apache-2.0"
    assert "`SmolLM2-135M-Instruct.Q4_1.gguf`, a quantized copy" in result["card"]
    assert any("in place of 'smollm2-135m'" in n for n in result["notes"])
    assert any("quantized copy" in n for n in result["notes"])


@pytest.mark.parametrize("folder", ["adapter", "checkpoints/checkpoint-3"])
def test_an_adapter_folder(run, folder):
    result = push(run / folder, "ada/words", dry_run=True)
    assert "adapter_model.safetensors" in result["files"]
    assert ("779 rows" in result["card"]) == (folder == "adapter"), "a run has one adapter"


def test_an_export_for_vllm_is_an_adapter(run, tmp_path):
    out = tmp_path / "vllm"
    shutil.copytree(run / "adapter", out)
    (out / "serve.sh").write_text(f"vllm serve {tmp_path}")
    write_manifest(out, "vllm", run, {})
    result = push(out, "ada/words", dry_run=True)
    assert result["skipped"] == ["export_manifest.json", "serve.sh"]
    assert "779 rows" in result["card"]


def test_a_card_of_the_user_is_uploaded_unchanged(run):
    (run / "adapter" / "README.md").write_text("# Mine\n")
    result = push(run, "ada/words", dry_run=True)
    assert result["card"] == "# Mine\n"
    assert any("unchanged" in n for n in result["notes"])


def test_a_card_on_the_hub_is_replaced_or_kept(hub, run):
    hub.make("ada/words", **{"README.md": b"theirs", "model.safetensors": b"x"})
    result = push(run, "ada/words", token=TOKEN, keep_card=True)
    assert get_card(hub) == "theirs"
    assert any("was not replaced" in n for n in result["notes"])
    assert any("other weights" in n and "model.safetensors" in n for n in result["notes"])
    result = push(run, "ada/words", token=TOKEN)
    assert get_card(hub) != "theirs"
    assert any("was replaced" in n for n in result["notes"])
    again = push(run, "ada/words", token=TOKEN)
    assert not again["committed"]
    assert any("no new commit" in n for n in again["notes"])


# --- refusals --------------------------------------------------------------------------------------------------------


def assert_refused(hub, run, error_class, match):
    with pytest.raises(error_class, match=match) as e:
        push(run, "ada/words", token=TOKEN)
    assert not [r for r in hub.requests if not r.startswith("GET")], "nothing was sent"
    assert TOKEN not in "".join(traceback.format_exception(e.value))


def test_a_run_without_an_adapter(hub, run):
    shutil.rmtree(run / "adapter")
    assert_refused(hub, run, RunError, "has no adapter yet")


def test_no_run(hub, run):
    assert_refused(hub, run.with_name("my rum"), UsageError, "did you mean 'my run'")
    (run.with_name("empty")).mkdir()
    assert_refused(hub, run.with_name("empty"), UsageError, "not a run folder")


def test_damaged_adapters(hub, run):
    file = run / "adapter" / "adapter_model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.zeros(3, 3)}, file)
    assert_refused(hub, run, AdapterError, "shape")
    save_file({k: t for k, t in tensors.items() if k != first}, file)
    assert_refused(hub, run, AdapterError, "missing")
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file)
    assert_refused(hub, run, AdapterError, "NaN or Inf in 1 of")
    file.write_bytes(content[:-7])
    assert_refused(hub, run, AdapterError, "safetensors")


def test_damaged_json_files(hub, run):
    (run / "result.json").write_text("{")
    assert_refused(hub, run, RunError, "result.json is damaged")
    (run / "result.json").unlink()
    (run / "adapter" / "adapter_config.json").write_text("{")
    assert_refused(hub, run, AdapterError, "not JSON")


def test_a_base_that_changed(hub, run, tiny_folder, tiny_llama):
    tiny_llama(rope_theta=77.0, num_hidden_layers=1).save_pretrained(tiny_folder)
    assert_refused(hub, run, AdapterError, "another base")


def test_a_base_that_is_missing_is_noted(run, tiny_folder):
    shutil.rmtree(tiny_folder)
    result = push(run, "ada/words", dry_run=True, base="ada/tiny")
    assert any("not loaded into its base" in n for n in result["notes"])


@pytest.mark.parametrize("options", [{"repo_id": "words"}, {"repo_id": "a/b/c"}, {"repo_id": "a/b", "base": "tiny"}])
def test_malformed_ids(run, options):
    with pytest.raises(UsageError, match=r"NAME/REPOSITORY|names no owner"):
        push(run, dry_run=True, **options)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_a_merged_model(hub, run, tmp_path):
    out = tmp_path / "merged"
    merge(run, out)
    result = push(out, "ada/whole", token=TOKEN)
    files = get_files(hub, "ada/whole")
    assert result["kind"] == "checkpoint"
    assert {"config.json", "README.md", "tokenizer.json"} <= set(files)
    assert any(n.endswith(".safetensors") for n in files)
    assert "export_manifest.json" not in files
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, f"{name} contains a local path"
    with pytest.raises(UsageError, match="--base is for adapters"):
        push(out, "ada/whole", base="ada/tiny", token=TOKEN)


def test_damaged_checkpoints(hub, tiny_folder):
    file = tiny_folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    assert_refused(hub, tiny_folder, ModelError, "is damaged")
    file.unlink()
    assert_refused(hub, tiny_folder, ModelError, "has no \\*.safetensors")
    file.write_bytes(content)
    (tiny_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert_refused(hub, tiny_folder, ModelError, "lacks 'model-2.safetensors'")


def test_gguf_files(run, tmp_path):
    from gguf import GGUFWriter

    out = tmp_path / "out"
    out.mkdir()
    writer = GGUFWriter(out / "adapter.gguf", "llama")
    writer.add_tensor("a", torch.ones(3, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (out / "Modelfile").write_text(f"FROM {tmp_path}\n")
    write_manifest(out, "ollama", run, {})
    result = push(out, "ada/gguf", dry_run=True)
    assert list(result["files"]) == ["adapter.gguf"]
    assert result["skipped"] == ["Modelfile", "export_manifest.json"]
    assert any("no README.md" in n for n in result["notes"])
    (out / "adapter.gguf").write_bytes((out / "adapter.gguf").read_bytes()[:40])
    with pytest.raises(ModelError, match="is damaged"):
        push(out, "ada/gguf", dry_run=True)
    (out / "adapter.gguf").unlink()
    with pytest.raises(UsageError, match="without weights"):
        push(out, "ada/gguf", dry_run=True)


# --- the command line ------------------------------------------------------------------------------------------------


def slimtune(*args: str):
    return CliRunner().invoke(app, list(args))


def test_the_push_command(hub, run, monkeypatch):
    assert slimtune("push", str(run), "ada/words").exit_code == 2, "without a token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = slimtune("push", str(run), "ada/words", "--private", "--branch", "v1", "--message", "m", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["repo_id"], result["private"], result["revision"]) == ("ada/words", True, "v1")
    repo = hub.repos["ada/words"]
    assert (repo.private, repo.branches["v1"][-1][0]) == (True, "m")
    assert "adapter_config.json" not in repo.files()
    assert TOKEN not in done.output
    assert "(private), main at" in slimtune("push", str(run), "ada/words").stdout
    assert "nothing was sent" in slimtune("push", str(run), "ada/words", "--dry-run").stdout


def test_the_push_command_shows_no_token_at_errors(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail["POST .*/commit/main"] = "echo"
    done = slimtune("push", str(run), "ada/words", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["kind"] == "RunError"
    assert TOKEN not in done.output


# --- push_to_hub -----------------------------------------------------------------------------------------------------


def test_push_to_hub(hub, run, caplog):
    model = load_run(run).model
    model.peft_config["default"].base_model_name_or_path = "ada/tiny"
    model.add_adapter("other", type(model.active_peft_config)(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    info = model.push_to_hub("words", token=TOKEN, private=True, tags=["dictionary"], commit_message="m")
    repo = hub.repos["ada/words"]
    assert repo.private
    assert info.oid == repo.sha()
    metadata = get_metadata(get_card(hub))
    assert metadata["base_model"] == "ada/tiny"
    assert {"dictionary", "lora", "slimtune"} <= set(metadata["tags"])
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(get_files(hub)) == {"README.md"} | own | {f"other/{n}" for n in own}
    repo.files()["README.md"] = b"by hand"
    model.push_to_hub("ada/words", token=TOKEN)
    assert get_card(hub) == "by hand", "it is kept, as PEFT keeps it"
    assert not [r for r in caplog.records if r.name.startswith("slimtune")]


def test_push_to_hub_uploads_no_path(hub, run, tmp_path, caplog):
    model = load_run(run).model
    model.push_to_hub("ada/words", token=TOKEN)
    for name, content in get_files(hub).items():
        assert str(tmp_path).encode() not in content, f"{name} contains a local path"
    assert "others cannot find the base 'tiny-base'" in caplog.text
    assert json.loads(get_files(hub)["adapter_config.json"])["base_model_name_or_path"] == "tiny-base"


# --- loading it back -------------------------------------------------------------------------------------------------

LOAD = """
import json
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import slimtune

def log_probabilities(model):
    ids = AutoTokenizer.from_pretrained("ada/words")("Define hope.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1).flatten().tolist()

def load_base():
    return AutoModelForCausalLM.from_pretrained("ada/tiny")

print(json.dumps({
    "slimtune": log_probabilities(slimtune.PeftModel.from_pretrained(load_base(), "ada/words")),
    "auto": log_probabilities(slimtune.AutoPeftModelForCausalLM.from_pretrained("ada/words")),
    "peft": log_probabilities(peft.PeftModel.from_pretrained(load_base(), "ada/words")),
}))
"""


def test_loaded_from_the_hub_it_answers_the_same(hub, run, tiny_folder, tmp_path):
    push(tiny_folder, "ada/tiny", token=TOKEN, private=True)
    push(run, "ada/words", token=TOKEN, private=True, base="ada/tiny")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, env={**os.environ, **settings}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run / "adapter")
    ids = AutoTokenizer.from_pretrained(tiny_folder)("Define hope.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1).flatten()
        with model.disable_adapter():
            effect = (model(ids).logits.log_softmax(-1).flatten() - expected).abs().max()
    assert effect > 0.1
    for library, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert (torch.tensor(found) - expected).abs().max() < 1e-5, library
