"""A run on the Hub: the adapter, a card that tells what is known, and nothing else; loaded back, it says the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import peft
import pytest
import torch
import yaml
from hand_run import make_run
from hub_server import TOKEN, online
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import slimtune.methods
from slimtune.adapters.config import PeftConfig
from slimtune.adapters.model import PeftModel
from slimtune.adapters.registry import built_in_methods
from slimtune.cli import app
from slimtune.errors import AdapterError, ModelError, RunError, UsageError
from slimtune.export.base_model_info import BaseModelInfo, Licence
from slimtune.export.folder import write_note
from slimtune.export.hub import push
from slimtune.export.merge import merge
from slimtune.export.model_card import OURS_ALONE, adapter_card
from slimtune.export.story import RunResults
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
    with online(monkeypatch) as found:
        yield found


@pytest.fixture
def run(tmp_path, tiny_folder):
    """A run as training leaves it: with a tokenizer, checkpoints, logs and the rest."""
    run = make_run(tmp_path / "my run", tiny_folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(run / "adapter")
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "plan.json").write_text(json.dumps(PLAN))
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "train.log").write_text("said\n")
    shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-3")
    return run


def files(hub, repo_id="ada/words") -> dict[str, bytes]:
    return {n: c for n, c in hub.repos[repo_id].files.items() if n != ".gitattributes"}


def card(hub, repo_id="ada/words") -> str:
    return files(hub, repo_id)["README.md"].decode()


def front(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_what_is_uploaded_and_what_is_not(hub, run, tmp_path):
    found = push(run, "ada/words", token=TOKEN)
    words = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert set(files(hub)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"} | words
    assert files(hub)["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for name, content in files(hub).items():
        assert str(tmp_path).encode() not in content, f"{name} tells of this disk"
        assert TOKEN.encode() not in content, name
    assert (found["repo_id"], found["url"], found["kind"]) == ("ada/words", f"{hub.url}/ada/words", "adapter")
    assert (found["private"], found["revision"], found["made"], found["changed"]) == (False, "main", True, True)
    assert found["commit"] == hub.repos["ada/words"].branches["main"][-1].sha
    assert found["files"] == {n: len(c) for n, c in files(hub).items()}
    assert found["bytes"] == sum(map(len, files(hub).values()))
    assert TOKEN not in json.dumps(found, default=str)
    assert [c.message for c in hub.repos["ada/words"].branches["main"]][1:] == ["lora adapter for tiny-base"]


def test_the_card_without_a_hub_id_says_so(hub, run, caplog):
    found = push(run, "ada/words", token=TOKEN)
    config = json.loads(files(hub)["adapter_config.json"])
    assert config["base_model_name_or_path"] == found["base"] == "tiny-base"
    assert "base_model" not in front(card(hub))
    assert "license" not in front(card(hub))
    assert "| licence of the base | unknown |" in card(hub)
    assert any("--base ORG/NAME" in n for n in found["notes"])
    assert any("licence" in n for n in found["notes"])
    assert found["notes"] == [r.message for r in caplog.records if r.name == "slimtune.export.hub"]


def test_the_card_tells_what_the_run_does(hub, run):
    (run / "eval-test.json").write_text(json.dumps(EVAL))
    found = push(run, "ada/words", token=TOKEN, base="ada/tiny")
    text = card(hub)
    assert found["held_out"] == "eval-test.json"
    assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == "ada/tiny"
    assert front(text)["base_model"] == "ada/tiny"
    assert front(text)["base_model_relation"] == "adapter"
    assert front(text)["tags"] == ["slimtune", "lora"]
    assert "| data | `my run-rows.jsonl`, 779 rows; 9699 tokens learned from |" in text
    assert (
        "`held.jsonl`, 93 rows: loss 4.520 before, 3.730 after; better by 0.790, 95 % interval 0.720 to 0.890" in text
    )
    assert "24 steps, 0.245 epochs, learning rate 0.0002, batches of 8 rows, seed 42, base in bfloat16" in text
    assert "planned 1.0 GiB to 3.0 GiB; the longest pass took 1.5 GiB; the run 2.0 GiB at most on cpu" in text
    assert "vllm serve ada/tiny --enable-lora --max-lora-rank 8 --lora-modules words=ada/words" in text
    assert '"r": 4' in text


@pytest.mark.parametrize(
    ("evals", "told_by"),
    [
        ({}, "result.json"),
        ({"eval-validation.json": EVAL}, "eval-validation.json"),
        ({"eval-validation.json": EVAL, "eval-data-x.json": EVAL}, "eval-data-x.json"),
        ({"eval-data-x.json": EVAL, "eval-test.json": EVAL}, "eval-test.json"),
        ({"eval-data-x.json": {**EVAL, "data": "TRAIN"}}, "result.json"),
        ({"eval-data-x.json": {"rows": 3}}, "result.json"),
    ],
)
def test_which_result_the_card_shows(run, evals, told_by):
    for name, values in evals.items():
        trained_on = str(run.with_name("my run-rows.jsonl"))
        (run / name).write_text(json.dumps(values).replace("TRAIN", trained_on))
    found = push(run, "ada/words", dry_run=True)
    assert found["held_out"] == told_by
    other = "loss 3.898 nats a token on the validation rows; the base was not measured"
    assert (other in found["card"]) == (told_by == "result.json")


def test_a_run_without_any_result(run):
    (run / "result.json").unlink()
    (run / "plan.json").unlink()
    found = push(run, "ada/words", dry_run=True)
    assert found["held_out"] is None
    assert "| held out | not measured |" in found["card"]
    assert "| memory |" not in found["card"]


def test_a_dry_run_sends_nothing(hub, run):
    found = push(run, "ada/words", dry_run=True)
    assert hub.asked == []
    assert found["card"].startswith("---\n")
    assert "url" not in found


def test_the_licence_is_the_bases_own(hub, run, tiny_folder):
    (tiny_folder / "README.md").write_text("---\nlicense: other\nlicense_name: words-1\nlicense_link: x\n---\n")
    push(run, "ada/words", token=TOKEN, base="ada/tiny")
    assert "| licence of the base | words-1 (says its model card) |" in card(hub)
    assert {k: v for k, v in front(card(hub)).items() if "license" in k} == {
        "license": "other",
        "license_name": "words-1",
        "license_link": "x",
    }


def test_the_licence_by_the_bases_card_on_the_hub(hub, run):
    hub.make("engines/tiny", **{"README.md": b"---\nlicense: mit\n---\n"})
    push(run, "ada/words", token=TOKEN, base="engines/tiny")
    assert front(card(hub))["license"] == "mit"


@pytest.mark.parametrize("where", ["adapter", "checkpoints/checkpoint-3"])
def test_an_adapter_folder(hub, run, where):
    found = push(run / where, "ada/words", token=TOKEN)
    assert "adapter_model.safetensors" in files(hub)
    assert ("779 rows" in card(hub)) == (where == "adapter"), "of the run it is the adapter of"
    assert found["base"] == "tiny-base"


def test_an_export_for_vllm_is_an_adapter(hub, run, tmp_path):
    out = tmp_path / "vllm"
    shutil.copytree(run / "adapter", out)
    (out / "serve.sh").write_text(f"vllm serve {tmp_path}")
    write_note(out, "vllm", run, {})
    found = push(out, "ada/words", token=TOKEN)
    assert found["left"] == ["serve.sh", "slimtune_export.json"]
    assert "779 rows" in card(hub)


def test_a_card_written_by_hand_goes_as_it_is(hub, run):
    (run / "adapter" / "README.md").write_text("# Mine\n")
    found = push(run, "ada/words", token=TOKEN)
    assert card(hub) == "# Mine\n"
    assert any("uploaded as it is" in n for n in found["notes"])


def test_a_card_on_the_hub_is_replaced_or_kept(hub, run):
    hub.make("ada/words", **{"README.md": b"theirs", "model.safetensors": b"x"})
    found = push(run, "ada/words", token=TOKEN, keep_card=True)
    assert card(hub) == "theirs"
    assert any("left as it is" in n for n in found["notes"])
    assert any("other weights" in n and "model.safetensors" in n for n in found["notes"])
    found = push(run, "ada/words", token=TOKEN)
    assert card(hub) != "theirs"
    assert any("was replaced" in n for n in found["notes"])
    again = push(run, "ada/words", token=TOKEN)
    assert again["changed"] is False
    assert any("no new commit" in n for n in again["notes"])


def test_private_and_branch(hub, run):
    found = push(run, "ada/words", token=TOKEN, private=True, revision="v2", message="second try")
    repo = hub.repos["ada/words"]
    assert repo.private
    assert found["private"]
    assert repo.branches["v2"][-1].message == "second try"
    assert found["revision"] == "v2"
    assert "adapter_config.json" not in repo.files


# --- what is no adapter ----------------------------------------------------------------------------------------------


def refused(hub, run, kind, match):
    with pytest.raises(kind, match=match) as raised:
        push(run, "ada/words", token=TOKEN)
    assert not [c for c in hub.calls() if not c.startswith("GET")], "nothing was sent"
    assert TOKEN not in "".join(traceback.format_exception(raised.value))


def test_a_run_without_an_adapter(hub, run):
    shutil.rmtree(run / "adapter")
    refused(hub, run, RunError, "has no adapter yet")


def test_no_run(hub, run):
    refused(hub, run.with_name("my rum"), UsageError, "did you mean 'my run'")
    (run.with_name("empty")).mkdir()
    refused(hub, run.with_name("empty"), UsageError, "no run folder")


def test_a_truncated_adapter(hub, run):
    file = run / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(hub, run, AdapterError, "no sound safetensors file")


def test_an_adapter_of_other_tensors(hub, run):
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.zeros(3, 3)}, file)
    refused(hub, run, AdapterError, "another shape")
    save_file({k: t for k, t in tensors.items() if k != first}, file)
    refused(hub, run, AdapterError, "missing")
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file)
    refused(hub, run, AdapterError, "numbers that are none in 1 of")


def test_a_damaged_config_or_result(hub, run):
    (run / "result.json").write_text("{")
    refused(hub, run, UsageError, "damaged")
    (run / "adapter" / "adapter_config.json").write_text("{")
    (run / "result.json").unlink()
    refused(hub, run, AdapterError, "not JSON")


def test_a_base_that_changed(hub, run, tiny_folder, tiny_llama):
    tiny_llama(rope_theta=77.0, num_hidden_layers=1).save_pretrained(tiny_folder)
    refused(hub, run, AdapterError, "made for another base")


def test_a_base_that_is_gone(hub, run, tiny_folder):
    shutil.rmtree(tiny_folder)
    found = push(run, "ada/words", token=TOKEN, base="ada/tiny")
    assert any("not held against its base" in n for n in found["notes"])
    assert "adapter_config.json" in files(hub)


@pytest.mark.parametrize("repo_id", ["words", "a/b/c", "https://huggingface.co/ada/words", "ada/wo rds"])
def test_the_form_of_an_id(hub, run, repo_id):
    with pytest.raises(UsageError, match=r"NAME/REPOSITORY|alone"):
        push(run, repo_id, token=TOKEN)
    assert hub.asked == []


def test_a_base_id_has_a_form_too(run):
    with pytest.raises(UsageError, match="names no owner"):
        push(run, "ada/words", base="tiny", dry_run=True)


# --- whole models ----------------------------------------------------------------------------------------------------


def test_a_merged_folder(hub, run, tmp_path):
    out = tmp_path / "merged"
    merge(run, out)
    found = push(out, "ada/whole", token=TOKEN)
    assert found["kind"] == "checkpoint"
    assert {"config.json", "README.md", "tokenizer.json"} <= set(files(hub, "ada/whole"))
    assert any(n.endswith(".safetensors") for n in files(hub, "ada/whole"))
    assert "slimtune_export.json" not in files(hub, "ada/whole")
    for name, content in files(hub, "ada/whole").items():
        assert str(tmp_path).encode() not in content, f"{name} tells of this disk"
    with pytest.raises(UsageError, match="--base is for an adapter"):
        push(out, "ada/whole", base="ada/tiny", token=TOKEN)


def test_a_damaged_checkpoint(hub, tiny_folder):
    file = tiny_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    refused(hub, tiny_folder, ModelError, "no sound safetensors file")
    file.unlink()
    refused(hub, tiny_folder, ModelError, "no weights")
    file.write_bytes(whole)
    (tiny_folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    refused(hub, tiny_folder, ModelError, "lacks 'model-2.safetensors'")


def test_a_gguf_folder(hub, run, tmp_path):
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
    write_note(out, "ollama", run, {})
    found = push(out, "ada/gguf", token=TOKEN)
    assert set(files(hub, "ada/gguf")) == {"adapter.gguf"}
    assert found["left"] == ["Modelfile", "slimtune_export.json"]
    assert any("no README.md" in n for n in found["notes"])
    (out / "adapter.gguf").write_bytes((out / "adapter.gguf").read_bytes()[:40])
    with pytest.raises(ModelError, match="is damaged"):
        push(out, "ada/gguf", token=TOKEN)
    (out / "adapter.gguf").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        push(out, "ada/gguf", token=TOKEN)


# --- the card's words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(built_in_methods()))
def test_what_peft_reads(name):
    assert (name.upper() in peft.PeftType.__members__) == (name not in OURS_ALONE)


def told(config: PeftConfig, origin: BaseModelInfo | None = None) -> str:
    origin = origin or BaseModelInfo("ada/tiny", "ada/tiny")
    facts = {"repo_id": "ada/words", "size": 9, "parameters": 9, "tokenizer": False, "chat": False}
    return adapter_card(config, origin, RunResults(), **facts)


def test_use_differs_by_method():
    lora = slimtune.methods.config_class("lora")
    assert "vllm serve" in told(lora())
    for settings in ({"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"r": 600},
                     {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}):  # fmt: skip
        assert "vllm serve" not in told(lora(**settings)), settings
        assert "merge_and_unload" in told(lora(**settings))
    bottleneck = told(slimtune.methods.config_class("bottleneck")())
    assert "peft has no method" in bottleneck
    assert "no change of weights" in bottleneck
    assert 'AutoTokenizer.from_pretrained("ada/tiny")' in bottleneck


def test_names_cannot_leave_their_cell():
    sly = Licence("a | b\n<script>", "x", {"license": "a: b\n---\n"})
    text = told(slimtune.methods.config_class("lora")(), BaseModelInfo("x`|y\n# z", None, None, sly, "q`.gguf"))
    assert front(text)["license"] == "a: b\n---\n"
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    assert "<script>" not in text
    assert "\n# z" not in text


# --- the command line ------------------------------------------------------------------------------------------------


def slim(*args: str):
    return CliRunner().invoke(app, list(args))


def test_the_verb(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = slim("push", str(run), "ada/words", "--private", "--branch", "v1", "--message", "m", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["repo_id"], found["private"], found["revision"]) == ("ada/words", True, "v1")
    assert TOKEN not in done.output
    done = slim("push", str(run), "ada/words")
    assert "(private), main at" in done.stdout
    assert "stays here" not in done.stdout
    done = slim("push", str(run), "ada/words", "--dry-run")
    assert "nothing was sent" in done.stdout


def test_the_verb_without_a_token_and_at_faults(hub, run, monkeypatch):
    done = slim("push", str(run), "ada/words")
    assert done.exit_code == 2
    assert "hf auth login" in done.stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail["POST .*/commit/main"] = "echo"
    done = slim("push", str(run), "ada/words", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["kind"] == "RunError"
    assert TOKEN not in done.output

    def bug(*_, **__):
        raise LookupError("a fault of ours")

    monkeypatch.setattr("slimtune.utils.hub.CommitOperationAdd", bug)
    done = slim("push", str(run), "ada/words", "--json")
    assert done.exit_code == 1
    assert "LookupError: a fault of ours" in done.output
    assert TOKEN not in done.output


# --- push_to_hub -----------------------------------------------------------------------------------------------------


def test_the_models_own_push(hub, run, caplog):
    model = load_run(run).model
    model.peft_config["default"].base_model_name_or_path = "ada/tiny"
    model.add_adapter("other", type(model.active_peft_config)(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    info = model.push_to_hub("words", token=TOKEN, private=True, tags=["dictionary"], commit_message="m")
    assert hub.repos["ada/words"].private
    assert info.oid == hub.repos["ada/words"].branches["main"][-1].sha
    assert front(card(hub))["base_model"] == "ada/tiny"
    assert front(card(hub))["tags"] == ["dictionary", "lora", "slimtune"]
    theirs = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(files(hub)) == {"README.md"} | theirs | {f"other/{n}" for n in theirs}
    hub.repos["ada/words"].files["README.md"] = b"by hand"
    model.push_to_hub("ada/words", token=TOKEN)
    assert card(hub) == "by hand", "it is left, as PEFT leaves it"
    assert not [r for r in caplog.records if r.name.startswith("slimtune")]


def test_the_models_own_push_names_no_path(hub, run, tmp_path, caplog):
    model = load_run(run).model
    model.push_to_hub("ada/words", token=TOKEN)
    for name, content in files(hub).items():
        assert str(tmp_path).encode() not in content, f"{name} tells of this disk"
    assert "others cannot find the base 'tiny-base'" in caplog.text
    assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == "tiny-base"
    with pytest.raises(UsageError, match="does not know this token"):
        model.push_to_hub("ada/words", token="hf_wrong")


# --- there and back --------------------------------------------------------------------------------------------------

BACK = """
import json, sys
import peft, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import slimtune

def said(model):
    ids = AutoTokenizer.from_pretrained("ada/words")("Define hope.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1).flatten().tolist()

def base():
    return AutoModelForCausalLM.from_pretrained("ada/tiny")

print(json.dumps({
    "slimtune": said(slimtune.PeftModel.from_pretrained(base(), "ada/words")),
    "auto": said(slimtune.AutoPeftModelForCausalLM.from_pretrained("ada/words")),
    "peft": said(peft.PeftModel.from_pretrained(base(), "ada/words")),
}))
"""


def test_loaded_back_it_says_the_same(hub, run, tiny_folder, tmp_path):
    push(tiny_folder, "ada/tiny", token=TOKEN, private=True)
    push(run, "ada/words", token=TOKEN, private=True, base="ada/tiny")
    calls = len(hub.asked)
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", BACK], capture_output=True, text=True, env={**os.environ, **where}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert len(hub.asked) > calls
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), run / "adapter")
    ids = AutoTokenizer.from_pretrained(tiny_folder)("Define hope.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits.log_softmax(-1).flatten()
        with model.disable_adapter():
            effect = (model(ids).logits.log_softmax(-1).flatten() - wanted).abs().max()
    assert effect > 0.1
    for way, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert (torch.tensor(found) - wanted).abs().max() < 1e-5, way


@pytest.mark.real
def test_an_alias_gets_the_id_others_know(hub, smollm2_folder, tmp_path):
    run = make_run(tmp_path / "run", smollm2_folder)
    recipe = (run / "recipe.yaml").read_text().replace(str(smollm2_folder), "smollm2-135m")
    (run / "recipe.yaml").write_text(recipe)
    found = push(run, "ada/words", token=TOKEN)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["base"] == name
    assert json.loads(files(hub)["adapter_config.json"])["base_model_name_or_path"] == name
    assert front(card(hub))["base_model"] == name
    assert front(card(hub))["license"] == "apache-2.0"
    assert "`SmolLM2-135M-Instruct.Q4_1.gguf`, a quantized copy" in card(hub)
    assert any("'smollm2-135m' is called" in n for n in found["notes"])
    assert any("quantized copy" in n for n in found["notes"])


def test_nothing_of_the_token_on_the_disk(hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    push(run, "ada/words")
    after = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before, "the run folder is as it was"
    assert not [p for p in after if TOKEN.encode() in Path(p).read_bytes()]
