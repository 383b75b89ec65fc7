"""transformers' Trainer and TRL take our models for peft's, where peft is installed and where it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainer_runs
from datasets import Dataset
from models_zoo import llama, run

import slimtune

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
HERE = Path(__file__).parent
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TRAINER = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def without_peft(tmp_path_factory):
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "trainer_runs.py", tmp_path_factory.mktemp("without")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])
    assert found.pop("peft imported") is False
    return found


@pytest.fixture(params=["with peft", "without peft"])
def found(request, tmp_path):
    def of(name, here):
        if request.param == "without peft":
            return request.getfixturevalue("without_peft")[name]
        return here(tmp_path / name)

    return of


def test_trainer_saves_resumes_and_reloads_the_adapter_alone(found):
    seen = found("plain", trainer_runs.plain_trainer)
    assert set(seen.pop("files")) == ADAPTER | TRAINER
    assert seen.pop("best checkpoint") == "checkpoint-2"
    assert seen == dict.fromkeys(seen, True)
    assert len(seen) == 5


def test_trl_sft(found):
    seen = found("sft", trainer_runs.sft)
    assert set(seen.pop("files")) == ADAPTER | TRAINER | TOKENIZER
    assert seen == {"ours": True, "trained": True, "base kept": True}


def test_trl_dpo_compares_with_the_base(found):
    seen = found("dpo", trainer_runs.dpo)
    # With peft, TRL keeps a copy of the adapter as it started beside it.
    extra = {"ref"} if "ref" in seen["adapters"] else set()
    assert set(seen["files"]) == ADAPTER | TRAINER | TOKENIZER | extra
    assert seen["ours"]
    difference = seen["reference is the base"]
    assert difference < 1e-4
    assert seen["tuned has moved"] > 0.1


def test_trl_builds_our_model_from_our_config(tmp_path):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(tmp_path), max_steps=1, save_steps=1, max_length=16, bf16=False, **trainer_runs.QUIET)
    trainer = SFTTrainer(
        model=llama(dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_dict({"text": ["alone in bad company"] * 8}),
        processing_class=trainer_runs.tokenizer(),
        peft_config=slimtune.LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.model, slimtune.PeftModel)
    trainer.train()
    assert set(trainer_runs.files(tmp_path / "checkpoint-1")) == ADAPTER | TRAINER | TOKENIZER
    again = slimtune.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "checkpoint-1")
    assert torch.equal(run(again), run(trainer.model.eval()))
