"""Several processes train what one trains: gradients, losses, files, resuming; and what happens when one fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as cases
from hypothesis import strategies as st
from row_files import write_jsonl
from safetensors.torch import load_file
from tiny_run import distance, metrics, recipe_of
from transformers import AutoModelForCausalLM
from two_processes import run_trainer

from slimtune import PeftModel
from slimtune.core.data.collator import Collator
from slimtune.core.data.step_sharding import DataParallelSharder, balance_micro_batches
from slimtune.core.training import checkpoint
from slimtune.core.training.train import train

HERE = Path(__file__).parent


def run_processes(*command: str, processes: int = 2) -> list[tuple[int, str, str]]:
    """Run a command as torchrun would, without torchrun, which takes seconds of its own; return codes and outputs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join([str(HERE), *sys.path])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "PYTHONPATH": paths}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([sys.executable, *command], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes)
        for r in range(processes)
    ]
    try:
        outputs = [p.communicate(timeout=500) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(started, outputs, strict=True)]


def run_checks(names: str, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Run checks of `two_processes.py`, in one launch: to start costs more than to check."""
    file, out = tmp_path / "settings.json", tmp_path / "found.json"
    file.write_text(json.dumps(settings))
    for code, _, err in run_processes(str(HERE / "two_processes.py"), names, str(file), str(out)):
        assert code == 0, err
    return json.loads(out.read_text())


def cut_back(run: Path, step: int) -> None:
    """Leave a run as it was when it had done so many steps."""
    for folder in checkpoint.list_checkpoints(run / "checkpoints"):
        if checkpoint.parse_checkpoint_step(folder) > step:
            shutil.rmtree(folder)
    (run / "adapter" / "adapter_model.safetensors").unlink()


# --- dividing a step --------------------------------------------------------------------------------------------------


@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=20), processes=st.integers(1, 6))
def test_micro_batches_are_balanced(costs, processes):
    assigned = balance_micro_batches(costs, processes)
    assert sorted(i for own in assigned for i in own) == list(range(len(costs)))
    load = [sum(costs[i] for i in own) for own in assigned]
    # No process has more than another by more than its own last micro-batch.
    assert max(load) - min(load) <= max(costs) + 1e-9
    if len(costs) >= processes:
        assert all(assigned)


@cases(max_examples=30)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=9),
    processes=st.integers(2, 4),
    max_tokens=st.sampled_from([None, 20, 90]),
    packing=st.booleans(),
)
def test_each_row_of_a_step_is_computed_once(lengths, processes, max_tokens, packing):
    rows = [[1, *range(5, 5 + n)] for n in lengths]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    collator = Collator(0, packing, with_packed_layout=packing, max_tokens=max_tokens, max_rows=3)
    found = [DataParallelSharder(collator, 16, processes, r).assign_groups(examples) for r in range(processes)]
    assert len({len(groups) for groups, _ in found}) == 1  # as many passes everywhere
    counted = [i for groups, weights in found for g, w in zip(groups, weights, strict=True) if w for i in g]
    assert sorted(counted) == list(range(len(rows)))
    if len(rows) >= processes:
        assert all(weights[0] == 1 for _, weights in found)


def test_long_rows_cost_more_than_their_tokens():
    def cost(*lengths):
        return DataParallelSharder(Collator(0, with_packed_layout=True), 64).cost(
            [{"input_ids": [*range(n)], "labels": [0] * n} for n in lengths]
        )

    assert cost(4000) > 4 * cost(1000)
    # 1000 tokens, and 1000 · 1001 / 2 pairs, of which 6 · 64 take what a token takes.
    assert cost(1000) == pytest.approx(1000 + 500500 / 384)
    padded = DataParallelSharder(Collator(0, packing=False), 64).cost(
        [{"input_ids": [1] * n, "labels": [1] * n} for n in (10, 4)]
    )
    assert padded == pytest.approx(20 + 200 / 384)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_and_errors_are_those_of_one_process(settings, tmp_path):
    """Whole and sharded base, checkpointed or not, a process without a row: methods that read weights their own way."""
    found = run_checks("gradients,errors", settings, tmp_path)
    gradients, errors = found["gradients"], found["errors"]
    for name, off in gradients.items():
        print(f"{off:.1e}  {name}")
    assert len(gradients) == 9 * 3
    assert max(off for name, off in gradients.items() if "16 bits" not in name) < 1e-5
    assert max(gradients.values()) < 0.02  # rounding to 16 bits
    assert errors["second"] == ["DataError", "process 1 of 2: message", "expected", "hint", 1]
    assert errors["all"] == ["UsageError", "message", "expected", "hint", 2]
    assert errors["first"] == ["DataError", "message", "expected", "hint", 1]
    assert errors["sums"] == [[[3.0] * 3] * 2, None, [[1.0] * 3] * 2]
    assert errors["main"] == 0


@pytest.mark.slow
def test_fsdp1_is_refused_with_a_hint(settings, tmp_path):
    assert "fully_shard" in run_checks("fsdp1", settings, tmp_path)["fsdp1"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(settings, tmp_path):
    settings["method"]["lora_dropout"] = 0.0
    # 24 rows, 7 a step: the last step of an epoch has 3.
    long = {"max_steps": 16, "batch_size": 7, "eval_steps": 4}
    one = train(recipe_of({**settings, "output_dir": str(tmp_path / "one")}, **long))
    half = train(recipe_of({**settings, "output_dir": str(tmp_path / "half")}, **{**long, "save_steps": 4}))
    cut_back(Path(half.run), 8)
    runs = {
        "whole": {"train": long},
        "sharded": {"train": {**long, "fsdp": True, "gradient_checkpointing": True}},
        "half": {"train": {**long, "save_steps": 4}, "resume": True},
    }
    found = run_checks("runs", {**settings, "output_dir": str(tmp_path), "runs": runs}, tmp_path)["runs"]
    for name in runs:
        run = found[name]["run"]
        assert distance(one.run, run) < 1e-4
        for value in ("train_loss", "validation_loss"):
            assert metrics(run, value) == pytest.approx(metrics(one.run, value), abs=1e-4)
        for value in ("steps", "trained_tokens", "supervised_tokens", "best_step", "trainable_params", "total_params"):
            assert found[name][value] == getattr(one, value), value
    # One process goes on where two were.
    run = Path(found["whole"]["run"])
    cut_back(run, checkpoint.parse_checkpoint_step(checkpoint.list_checkpoints(run / "checkpoints")[0]))
    train(recipe_of({**settings, "output_dir": str(run)}, **long), resume=True)
    assert distance(one.run, run) < 1e-4
    # The file is whole, and loads here and in PEFT.
    base, ids = settings["model"]["name"], torch.arange(5, 25)[None]
    ours, theirs = (
        c.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found["sharded"]["adapter"])
        for c in (PeftModel, peft.PeftModel)
    )
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_the_pairs_and_classes_of_one(settings, tmp_path):
    settings["method"]["lora_dropout"] = 0.0
    pairs = [
        {"prompt": f"say {i}: ", "chosen": "abc " * (1 + i % 5), "rejected": "xyz " * (1 + i % 3)} for i in range(24)
    ]
    texts = [{"text": f"say {name} {i}", "label": name} for i in range(8) for name in ("sea", "wood", "city")]
    data = {}
    rated = [{"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    for name, rows in {"pairs": pairs, "rated": rated, "texts": texts}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        data[name] = {"train": str(tmp_path / f"{name}.jsonl"), "validation_fraction": 0.25}
    steps = {"max_steps": 6, "batch_size": 7, "eval_steps": 3, "max_tokens_per_micro_batch": 100}
    tasks = {"dpo": "pairs", "orpo": "pairs", "kto": "rated", "reward": "pairs", "classification": "texts"}
    runs = {task: {"train": steps, "sections": {"task": task, "data": data[rows]}} for task, rows in tasks.items()}
    found = run_checks("runs", {**settings, "output_dir": str(tmp_path / "two"), "runs": runs}, tmp_path)["runs"]
    for task, run in runs.items():
        alone = recipe_of({**settings, **run["sections"], "output_dir": str(tmp_path / task)}, **steps)
        one, two = train(alone).run, found[task]["run"]
        assert distance(one, two) < 1e-4, task
        for value in ("train_loss", "validation_loss", "grad_norm"):
            assert metrics(two, value) == pytest.approx(metrics(one, value), abs=1e-4), (task, value)
        if task in ("dpo", "kto"):
            ours, theirs = (load_file(Path(folder) / "reference.safetensors") for folder in (one, two))
            assert all(torch.allclose(ours[k], theirs[k], atol=1e-4) for k in ours)


@pytest.mark.slow
def test_trainer_of_transformers_wraps_an_adapted_model(settings, tmp_path):
    """Plain DDP, a script of one's own: two processes of 3 rows are one of 6."""
    one = run_trainer(settings["model"]["name"], str(tmp_path / "one"), 6)
    settings["output_dir"] = str(tmp_path / "two")
    two = run_checks("trainer", settings, tmp_path)["trainer"]
    assert two["wrapped"] == "DistributedDataParallel"
    assert len(two["losses"]) == 10
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


# --- when something fails ---------------------------------------------------------------------------------------------


def test_other_commands_want_one_process(monkeypatch, slimtune):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("slimtune.core.foundation.distributed.wait_to_claim_printing_new_error", lambda error: True)
    done = slimtune("methods")
    assert done.exit_code == 2
    assert "4 processes" in done.stderr


@pytest.mark.faults
def test_error_is_printed_once(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(settings).to_yaml().replace("seed: 42", "sed: 42"))
    (code, out, err), (other, nothing, silence) = run_processes("-m", "slimtune", "train", str(file))
    assert (code, other) == (2, 2)
    assert "'seed'" in err
    assert (out, nothing, silence) == ("", "", "")
    assert not Path(settings["output_dir"]).exists()


# Slow enough to be hit; one process is gone at a step, as if the machine had killed it.
DIES = """
import os, signal, time
from slimtune.core.training.training_loop import TrainingLoop
after_step = TrainingLoop.after_step
def dies(self, values):
    time.sleep(0.05)
    if self.state.step == 11 and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.{signal})
    return after_step(self, values)
TrainingLoop.after_step = dies
from slimtune.cli import main
main()
"""


def write_program(settings: dict[str, Any], tmp_path: Path, rank: int, signal: str) -> tuple[str, str, str]:
    """Write a program whose process `rank` gets a signal at step 11, and a recipe; return its command."""
    program, recipe = tmp_path / "dies.py", tmp_path / "recipe.yaml"
    program.write_text(DIES.format(rank=rank, signal=signal))
    recipe.write_text(recipe_of(settings).to_yaml())
    return str(program), "train", str(recipe)


def newest_checkpoint(settings: dict[str, Any]) -> str:
    return checkpoint.list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1].name


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "fsdp"), [(0, False), (1, False), (1, True)])
def test_killed_process_ends_the_run_resumably(settings, tmp_path, rank, fsdp):
    settings["method"]["lora_dropout"] = 0.0
    settings["train"] |= {"max_steps": 20, "save_steps": 5, "fsdp": fsdp}
    whole = train(recipe_of({**settings, "output_dir": str(tmp_path / "whole")}))
    program = write_program(settings, tmp_path, rank, "SIGKILL")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = time.monotonic()
    done = subprocess.run([*torchrun, *program], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert time.monotonic() - start < 120
    message = " ".join(done.stderr.split())
    assert message.count("error: another process of this run has ended") == 1
    assert f"slimtune train {settings['output_dir']}/recipe.yaml --resume" in message
    assert newest_checkpoint(settings) == "checkpoint-10"
    resumed = train(recipe_of(settings), resume=True)
    assert metrics(resumed.run, "train_loss") == pytest.approx(metrics(whole.run, "train_loss"), abs=1e-4)
    assert distance(whole.run, resumed.run) < 1e-4


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("SIGINT", 130, "stopped at step 12; go on with: slimtune train"),
        ("SIGTERM", 143, "error: stopped at step 12 by SIGTERM"),
        ("SIGHUP", 129, "error: stopped at step 12 by SIGHUP"),
    ],
)
def test_signal_to_one_process_stops_all_at_one_step(settings, tmp_path, name, code, words):
    settings["train"] |= {"max_steps": 20, "save_steps": 20}
    (first, _, err), (other, _, silence) = run_processes(*write_program(settings, tmp_path, 1, name))
    assert (first, other) == (code, code)
    assert err.count(words) == 1
    assert "stop" not in silence
    assert "error" not in silence
    assert newest_checkpoint(settings) == "checkpoint-12"
