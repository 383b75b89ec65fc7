"""`slimtune push`: the adapter, a card with what is known, and nothing else; loaded back, it answers the same."""

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from hand_run import make_run
from hub_server import TOKEN
from safetensors.torch import load_file, save_file
from tiny_gguf import finish_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.cli.json_types import make_command_output_schema
from slimtune.core.adapters.peft_model import PeftModel
from slimtune.core.foundation.files import write_json
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.core.training.trained_model import load_run
from slimtune.errors import AdapterError, ModelError, RunError, UsageError
from slimtune.export import push_to_hub as hub_module
from slimtune.export.manifest import write_export_manifest
from slimtune.export.merge import merge
from slimtune.export.push_to_hub import push as push_run


def push(*args: Any, **options: Any) -> dict[str, Any]:
    """Return what `slimtune push --json` prints."""
    return to_json_dict(push_run(*args, **options))


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


def get_metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def has_note(result: dict, words: str) -> bool:
    return any(words in note for note in result["notes"])


def assert_no_local_path(files, tmp_path):
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, f"{name} contains a local path"


# --- adapters --------------------------------------------------------------------------------------------------------


def test_only_adapter_tokenizer_and_card_are_uploaded(hub, run, tmp_path):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    result = push(run, "ada/words", token=TOKEN)
    files, repo = get_files(hub), hub.repos["ada/words"]
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | tokenizer
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert_no_local_path(files, tmp_path)
    assert not any(TOKEN.encode() in content for content in files.values())
    assert TOKEN not in json.dumps(result, default=str)
    assert result["files"] == {n: len(c) for n, c in files.items()}
    assert result["bytes"] == sum(map(len, files.values()))
    expected = {
        "repo_id": "ada/words", "url": f"{hub.url}/ada/words", "kind": "adapter", "private": False, "revision": "main",
        "created": True, "committed": True, "commit": repo.sha(),
    }  # fmt: skip
    assert {k: result[k] for k in expected} == expected
    assert "tiny-base" in repo.branches["main"][-1][0]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, "the run folder is unchanged"


def test_card_with_results(run):
    write_json(run / "eval-test.json", EVAL)
    result = push(run, "ada/words", dry_run=True, base_hub_id="ada/tiny")
    metadata = get_metadata(result["card"])
    assert (result["base"], result["eval_file"]) == ("ada/tiny", "eval-test.json")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("ada/tiny", "adapter")
    assert {"slimtune", "lora", "base_model:adapter:ada/tiny"} <= set(metadata["tags"])
    for text in (
        "| data | `my run-trained.jsonl`, 779 rows; 9699 supervised tokens |",
        "`held.jsonl`, 93 rows: loss 4.520 before, 3.730 after; lower by 0.790, 95 % interval 0.720 to 0.890",
        "24 steps, 0.245 epochs, learning rate auto, batches of 8 rows, seed 42, base in bfloat16",
        "planned 1.0 GiB to 3.0 GiB; the longest micro-batch took 1.5 GiB; the run took at most 2.0 GiB on cpu",
        "vllm serve ada/tiny --enable-lora --max-lora-rank 8 --lora-modules words=ada/words",
        '"r": 4',
    ):
        assert text in result["card"]


def test_card_with_fewer_results(run):
    result = push(run, "ada/words", dry_run=True)
    assert result["eval_file"] == "result.json"
    assert "loss 3.898 " in result["card"]
    (run / "result.json").unlink()
    (run / "plan.json").unlink()
    result = push(run, "ada/words", dry_run=True)
    assert result["eval_file"] is None
    assert re.search(r"^\| held-out rows \| \D+ \|$", result["card"], re.MULTILINE)
    assert "| memory |" not in result["card"]


def test_dry_run_sends_nothing(hub, run):
    result = push(run, "ada/words", dry_run=True)
    assert hub.requests == []
    assert result["card"].startswith("---\n")
    assert "url" not in result


def test_base_without_hub_id(hub, run, caplog):
    result = push(run, "ada/words", token=TOKEN)
    config, card = json.loads(get_files(hub)["adapter_config.json"]), get_files(hub)["README.md"].decode()
    assert config["base_model_name_or_path"] == result["base"] == "tiny-base"
    assert not {"base_model", "license"} & set(get_metadata(card))
    assert re.search(r"^\| licence .*\bunknown \|$", card, re.MULTILINE)
    assert has_note(result, "--base ORG/NAME")
    assert has_note(result, "licence")
    assert result["notes"] == [r.message for r in caplog.records if r.name == "slimtune.export.push_to_hub"]


def test_licence(hub, run, tiny_folder):
    hub.make("engines/tiny", **{"README.md": b"---\nlicense: mit\n---\n"})
    assert get_metadata(push(run, "ada/words", dry_run=True, base_hub_id="engines/tiny")["card"])["license"] == "mit"
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: words-1\nlicense_link: x\n---\n")
    card = push(run, "ada/words", dry_run=True, base_hub_id="ada/tiny")["card"]
    assert re.search(r"^\| licence .*\bwords-1 ", card, re.MULTILINE)
    expected = {"license": "other", "license_name": "words-1", "license_link": "x"}
    assert {k: v for k, v in get_metadata(card).items() if "license" in k} == expected


@pytest.mark.slow
@pytest.mark.real
def test_alias_becomes_the_hub_id(smollm2_folder, tmp_path):
    run = make_run(tmp_path / "run", smollm2_folder)
    recipe = (run / "recipe.yaml").read_text().replace(str(smollm2_folder), "smollm2-135m")
    (run / "recipe.yaml").write_text(recipe)
    result = push(run, "ada/words", dry_run=True)
    assert result["base"] == get_metadata(result["card"])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert get_metadata(result["card"])["license"] == "apache-2.0"
    assert "`SmolLM2-135M-Instruct.Q4_1.gguf`" in result["card"]
    assert has_note(result, "in place of 'smollm2-135m'")
    assert has_note(result, "quantized copy")


@pytest.mark.parametrize("folder", ["adapter", "checkpoints/checkpoint-3"])
def test_adapter_folder(run, folder):
    result = push(run / folder, "ada/words", dry_run=True)
    assert "adapter_model.safetensors" in result["files"]
    assert ("779 rows" in result["card"]) == (folder == "adapter"), "a run has one adapter"


def test_export_for_vllm(run, tmp_path):
    out = shutil.copytree(run / "adapter", tmp_path / "vllm")
    (out / "serve.sh").write_text(f"vllm serve {tmp_path}")
    write_export_manifest(out, "vllm", run, {})
    result = push(out, "ada/words", dry_run=True)
    assert result["skipped"] == ["export_manifest.json", "serve.sh"]
    assert "779 rows" in result["card"]


def test_card_of_the_user(run):
    (run / "adapter" / "README.md").write_text("# Mine\n")
    result = push(run, "ada/words", dry_run=True)
    assert result["card"] == "# Mine\n"
    assert has_note(result, "unchanged")


def test_card_on_the_hub(hub, run):
    hub.make("ada/words", **{"README.md": b"theirs", "model.safetensors": b"x"})
    result = push(run, "ada/words", token=TOKEN, keep_card=True)
    assert get_files(hub)["README.md"] == b"theirs"
    assert has_note(result, "was not replaced")
    assert has_note(result, "other weights, too: 'model.safetensors'")
    assert has_note(push(run, "ada/words", token=TOKEN), "was replaced")
    assert get_files(hub)["README.md"] != b"theirs"
    again = push(run, "ada/words", token=TOKEN)
    assert not again["committed"]
    assert has_note(again, "no new commit")


def test_missing_base_is_noted(run, tiny_folder):
    shutil.rmtree(tiny_folder)
    assert has_note(push(run, "ada/words", dry_run=True, base_hub_id="ada/tiny"), "not loaded into its base")


# --- refusals --------------------------------------------------------------------------------------------------------


def assert_refused(hub, run, error_class, match):
    with pytest.raises(error_class, match=match) as e:
        push(run, "ada/words", token=TOKEN)
    assert not [r for r in hub.requests if not r.startswith("GET")], "nothing was sent"
    assert TOKEN not in "".join(traceback.format_exception(e.value))


def test_no_run_or_no_adapter(hub, run):
    assert_refused(hub, run.with_name("my rum"), UsageError, "did you mean 'my run'")
    (run.with_name("empty")).mkdir()
    assert_refused(hub, run.with_name("empty"), UsageError, "not a run folder")
    shutil.rmtree(run / "adapter")
    assert_refused(hub, run, RunError, "has no adapter yet")


def test_damaged_files(hub, run):
    file = run / "adapter" / "adapter_model.safetensors"
    content, tensors = file.read_bytes(), load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.zeros(3, 3)}, file)
    assert_refused(hub, run, AdapterError, "size mismatch")
    save_file({k: t for k, t in tensors.items() if k != first}, file)
    assert_refused(hub, run, AdapterError, "missing")
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file)
    assert_refused(hub, run, AdapterError, "NaN or Inf in 1 of")
    file.write_bytes(content[:-7])
    assert_refused(hub, run, AdapterError, "safetensors")
    file.write_bytes(content)
    (run / "adapter" / "adapter_config.json").write_text("{")
    assert_refused(hub, run, AdapterError, "not JSON")
    (run / "result.json").write_text("{")
    assert_refused(hub, run, RunError, "result.json is damaged")


def test_changed_base(hub, run, tiny_folder, tiny_llama):
    tiny_llama(rope_theta=77.0, num_hidden_layers=1).save_pretrained(tiny_folder)
    assert_refused(hub, run, AdapterError, "another base")


@pytest.mark.parametrize(
    "options", [{"repo_id": "words"}, {"repo_id": "a/b/c"}, {"repo_id": "a/b", "base_hub_id": "tiny"}]
)
def test_malformed_ids(run, options):
    with pytest.raises(UsageError, match=r"NAME/REPOSITORY|owner"):
        push(run, dry_run=True, **options)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_merged_model(hub, run, tmp_path):
    out = tmp_path / "merged"
    merge(run, out)
    result = push(out, "ada/whole", token=TOKEN)
    files = get_files(hub, "ada/whole")
    assert result["kind"] == "checkpoint"
    assert {"config.json", "README.md", "tokenizer.json", "model.safetensors"} <= set(files)
    assert "export_manifest.json" not in files
    assert_no_local_path(files, tmp_path)
    with pytest.raises(UsageError, match="--base"):
        push(out, "ada/whole", base_hub_id="ada/tiny", token=TOKEN)


def test_damaged_checkpoint(hub, tiny_folder):
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
    finish_gguf(writer)
    (out / "Modelfile").write_text(f"FROM {tmp_path}\n")
    write_export_manifest(out, "ollama", run, {})
    result = push(out, "ada/gguf", dry_run=True)
    assert (list(result["files"]), result["skipped"]) == (["adapter.gguf"], ["Modelfile", "export_manifest.json"])
    assert has_note(result, "no README.md")
    (out / "adapter.gguf").write_bytes((out / "adapter.gguf").read_bytes()[:40])
    with pytest.raises(ModelError, match="damaged"):
        push(out, "ada/gguf", dry_run=True)
    (out / "adapter.gguf").unlink()
    with pytest.raises(UsageError, match="not uploaded"):
        push(out, "ada/gguf", dry_run=True)


# --- the command line and push_to_hub --------------------------------------------------------------------------------


def test_command_line(hub, run, monkeypatch):
    def push_(*args: str):
        return CliRunner().invoke(app, ["push", str(run), "ada/words", *args])

    assert push_().exit_code == 2, "without a token"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = push_("--private", "--branch", "v1", "--message", "m", "--json")
    assert done.exit_code == 0, done.output
    result, repo = json.loads(done.stdout), hub.repos["ada/words"]
    jsonschema.validate(result, make_command_output_schema("push"))
    assert (result["repo_id"], result["private"], result["revision"]) == ("ada/words", True, "v1")
    assert (repo.private, repo.branches["v1"][-1][0]) == (True, "m")
    assert "adapter_config.json" not in repo.files()
    sent = len(hub.requests)
    assert (push_("--dry-run").exit_code, len(hub.requests)) == (0, sent)
    hub.fail["POST .*/commit/main"] = "echo"
    failed = push_("--json")
    hub.fail.clear()
    assert "(private), main at" in push_().stdout
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"]["kind"] == "RunError"
    assert TOKEN not in done.output + failed.output


def test_push_to_hub(hub, run, caplog):
    model = load_run(run).model
    model.peft_config["default"].base_model_name_or_path = "ada/tiny"
    model.add_adapter("other", type(model.active_peft_config)(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    info = model.push_to_hub("words", token=TOKEN, private=True, tags=["dictionary"], commit_message="m")
    repo = hub.repos["ada/words"]
    assert repo.private
    assert info.oid == repo.sha()
    metadata = get_metadata(get_files(hub)["README.md"].decode())
    assert metadata["base_model"] == "ada/tiny"
    assert {"dictionary", "lora", "slimtune"} <= set(metadata["tags"])
    own = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(get_files(hub)) == {"README.md"} | own | {f"other/{n}" for n in own}
    repo.files()["README.md"] = b"by hand"
    model.push_to_hub("ada/words", token=TOKEN)
    assert get_files(hub)["README.md"] == b"by hand", "it is kept, as PEFT keeps it"
    assert not [r for r in caplog.records if r.name.startswith("slimtune")]


def test_push_to_hub_without_local_path(hub, run, tmp_path, caplog):
    load_run(run).model.push_to_hub("ada/words", token=TOKEN)
    assert_no_local_path(get_files(hub), tmp_path)
    assert "'tiny-base'" in caplog.text
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


@pytest.mark.slow
def test_loaded_from_the_hub(hub, run, tiny_folder, tmp_path):
    push(tiny_folder, "ada/tiny", token=TOKEN, private=True)
    push(run, "ada/words", token=TOKEN, private=True, base_hub_id="ada/tiny")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run / "adapter")
    ids = AutoTokenizer.from_pretrained(tiny_folder)("Define hope.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1).flatten()
        with model.disable_adapter():
            assert (model(ids).logits.log_softmax(-1).flatten() - expected).abs().max() > 0.1
    for library, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert (torch.tensor(found) - expected).abs().max() < 1e-5, library


def test_a_run_is_uploaded_without_local_paths_and_links(run, tmp_path):
    file = run / "adapter" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name_or_path": str(tmp_path)}))
    (tmp_path / "secret.txt").write_text("root:x:0:0")
    for name in ("LICENSE.txt", "special_tokens_map.json"):
        (run / "adapter" / name).symlink_to(tmp_path / "secret.txt")
    (run / "adapter" / "vocab.json").write_text('{"a": "password"}')
    (run / "adapter" / "merges.txt").write_text("my diary of today\n")
    (run / "adapter" / "tokenizer.model").write_text("my diary")
    upload = hub_module._prepare_upload(run, "ada/words", None, None)
    assert str(tmp_path).encode() not in upload.files["tokenizer_config.json"]
    assert not {"LICENSE.txt", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model"} & set(
        upload.files
    )
    for words in ("LICENSE.txt is a link", "vocab.json is not uploaded", "merges.txt is", "not a sentencepiece model"):
        assert has_note({"notes": upload.notes}, words)


def test_weights_elsewhere_are_refused(run, tmp_path):
    file = run / "adapter" / "adapter_model.safetensors"
    file.rename(tmp_path / "weights")
    file.symlink_to(tmp_path / "weights")
    with pytest.raises(UsageError, match="link") as caught:
        push(run, "ada/words", dry_run=True)
    assert caught.value.hint.startswith("cp -rL")


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "a" * 34])
def test_dry_run_looks_for_a_token(run, secret):
    (run / "adapter" / "LICENSE").write_text(f"licence {secret} text")
    with pytest.raises(UsageError, match="LICENSE"):
        push(run, "ada/words", dry_run=True, token=TOKEN)
