"""Several processes train what one trains: gradients, losses, files, resuming; and what happens when one fails."""

import json
import os
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
from safetensors.torch import load_file
from tiny_run import recipe_of
from transformers import AutoModelForCausalLM
from two_processes import own_trainer

from slimtune import PeftModel
from slimtune.data.collator import Collator
from slimtune.data.step_sharding import StepSharder, balance
from slimtune.training import checkpoint
from slimtune.training.train import train

HERE = Path(__file__).parent


def launched(*command: str, processes: int = 2) -> list[subprocess.Popen]:
    """Start a command as torchrun would, without torchrun, which takes seconds of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = os.pathsep.join([str(HERE), *sys.path])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "PYTHONPATH": paths}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(processes)
    ]


def ended(started: list[subprocess.Popen], seconds: float = 500) -> list[tuple[int, str, str]]:
    try:
        said = [p.communicate(timeout=seconds) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(started, said, strict=True)]


def checked(names: str, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Run checks of `two_processes.py`, in one launch: to start costs more than to check."""
    file, out = tmp_path / "settings.json", tmp_path / "found.json"
    file.write_text(json.dumps(settings))
    for code, _, err in ended(launched(str(HERE / "two_processes.py"), names, str(file), str(out))):
        assert code == 0, err
    return json.loads(out.read_text())


def losses(run: str | Path) -> list[float]:
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [m["train_loss"] for m in lines if "train_loss" in m]


def validation(run: str | Path) -> list[float]:
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [m["validation_loss"] for m in lines if "validation_loss" in m]


def adapter(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def most(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


# --- dividing a step --------------------------------------------------------------------------------------------------


@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=20), hands=st.integers(1, 6))
def test_micro_batches_are_balanced(costs, hands):
    held = balance(costs, hands)
    assert sorted(p for hand in held for p in hand) == list(range(len(costs)))
    load = [sum(costs[p] for p in hand) for hand in held]
    # No hand has more than another by more than its own last pack.
    assert max(load) - min(load) <= max(costs) + 1e-9
    if len(costs) >= hands:
        assert all(held)


@cases(max_examples=30)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=9),
    hands=st.integers(2, 4),
    room=st.sampled_from([None, 20, 90]),
    packing=st.booleans(),
)
def test_each_row_of_a_step_is_computed_once(lengths, hands, room, packing):
    rows = [[1, *range(5, 5 + n)] for n in lengths]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    collator = Collator(0, packing, layout=packing, max_tokens=room, max_rows=3)
    found = [StepSharder(collator, 16, hands, h).assign_groups(examples) for h in range(hands)]
    assert len({len(groups) for groups, _ in found}) == 1  # as many passes everywhere
    counted = [i for groups, weights in found for g, w in zip(groups, weights, strict=True) if w for i in g]
    assert sorted(counted) == list(range(len(rows)))
    if len(rows) >= hands:
        assert all(weights[0] == 1 for _, weights in found)


def test_long_rows_weigh_more_than_their_tokens():
    def cost(*lengths):
        return StepSharder(Collator(0, layout=True), 64).cost([{"input_ids": [*range(n)]} for n in lengths])

    assert cost(4000) > 4 * cost(1000)
    # 1000 tokens, and 1000 · 1001 / 2 pairs, of which 6 · 64 take what a token takes.
    assert cost(1000) == pytest.approx(1000 + 500500 / 384)
    padded = StepSharder(Collator(0, packing=False), 64).cost([{"input_ids": [1] * n} for n in (10, 4)])
    assert padded == pytest.approx(20 + 200 / 384)


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradients_and_errors_are_those_of_one_process(settings, tmp_path):
    """Whole and divided base, checkpointed or not, a process without a row: methods that read weights their own way."""
    found = checked("gradients,faults", settings, tmp_path)
    gradients, faults = found["gradients"], found["faults"]
    for name, off in gradients.items():
        print(f"{off:.1e}  {name}")
    assert len(gradients) == 8 * 3
    assert max(gradients.values()) < 1e-5
    assert faults["the second's"] == ["DataError", "process 1 of 2: message", "expected", "hint", 1]
    assert faults["all's"] == ["UsageError", "message", "expected", "hint", 2]
    assert faults["the first's"] == ["DataError", "message", "expected", "hint", 1]
    assert faults["sums"] == [[[3.0] * 3] * 2, None, [[1.0] * 3] * 2]
    assert faults["stays"] == 0


def test_two_processes_train_what_one_trains(settings, tmp_path):
    settings["method"]["lora_dropout"] = 0.0
    # 24 rows, 7 a step: the last step of an epoch has 3.
    long = {"max_steps": 16, "batch_size": 7, "eval_steps": 4}
    one = train(recipe_of({**settings, "output_dir": str(tmp_path / "one")}, **long))
    half = train(recipe_of({**settings, "output_dir": str(tmp_path / "half")}, **{**long, "save_steps": 4}))
    cut_back(Path(half["run"]), 8)
    runs = {
        "whole": {"train": long},
        "divided": {"train": {**long, "fsdp": True, "gradient_checkpointing": True}},
        "half": {"train": {**long, "save_steps": 4}, "resume": True},
    }
    settings["output_dir"] = str(tmp_path)
    found = checked("runs", {**settings, "runs": runs}, tmp_path)["runs"]
    for name in ("whole", "divided", "half"):
        run = found[name]["run"]
        off = most(losses(one["run"]), losses(run)), apart(adapter(one["run"]), adapter(run))
        print(f"{name}: losses within {off[0]:.1e}, adapter within {off[1]:.1e} of one process's")
        assert len(losses(run)) == 16
        assert max(off) < 1e-4
        assert most(validation(one["run"]), validation(run)) < 1e-4
        for figure in ("trained_tokens", "supervised_tokens", "best_step", "trainable_params", "total_params"):
            assert found[name][figure] == one[figure], figure
    # One process goes on where two were.
    run = Path(found["whole"]["run"])
    cut_back(run, checkpoint.checkpoint_step(checkpoint.list_checkpoints(run / "checkpoints")[0]))
    alone = train(recipe_of({**settings, "output_dir": str(run)}, **long), resume=True)
    assert apart(adapter(one["run"]), adapter(alone["run"])) < 1e-4
    # The file is whole, and loads here and in PEFT.
    base = settings["model"]["name"]
    ids = torch.arange(5, 25)[None]
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found["divided"]["adapter"])
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), found["divided"]["adapter"])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


def test_the_trainer_of_transformers_wraps_an_adapted_model(settings, tmp_path):
    """Plain DDP, a script of one's own: two processes of 3 rows are one of 6."""
    one = own_trainer(settings["model"]["name"], str(tmp_path / "one"), 6)
    settings["output_dir"] = str(tmp_path / "two")
    two = checked("own_trainer", settings, tmp_path)["own_trainer"]
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two")]
    print(f"losses within {most(one['losses'], two['losses']):.1e}, adapter within {apart(*weights):.1e}")
    assert two["wrapped"] == "DistributedDataParallel"
    assert len(two["losses"]) == 10
    assert most(one["losses"], two["losses"]) < 1e-4
    assert apart(*weights) < 1e-4


def cut_back(run: Path, step: int) -> None:
    """Leave a run as it was when it had done so many steps."""
    for folder in checkpoint.list_checkpoints(run / "checkpoints"):
        if checkpoint.checkpoint_step(folder) > step:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    (run / "adapter" / "adapter_model.safetensors").unlink()


# --- when something fails ---------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_an_error_is_printed_once(settings, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(settings).to_yaml().replace("q_proj", "q_prj").replace("seed: 42", "sed: 42"))
    (code, out, err), (other, nothing, silence) = ended(launched("-m", "slimtune", "train", str(file)))
    assert (code, other) == (2, 2)
    assert "did you mean 'seed'?" in err
    assert (out, nothing, silence) == ("", "", "")
    assert not Path(settings["output_dir"]).exists()


def test_other_commands_want_one_process(monkeypatch):
    from typer.testing import CliRunner

    from slimtune.cli import app

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("slimtune.utils.distributed.should_print_error", lambda error: True)
    done = CliRunner().invoke(app, ["methods"])
    assert done.exit_code == 2
    assert "slimtune methods was started in 4 processes" in done.stderr


# Slow enough to be hit; one process is gone at a step, as if the machine had killed it.
DIES = """
import os, signal, time
from slimtune.training.loop import TrainingLoop
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


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "divide"), [(0, False), (1, False), (1, True)])
def test_a_killed_process_ends_the_run_resumably(settings, tmp_path, rank, divide):
    settings["method"]["lora_dropout"] = 0.0
    settings["train"] |= {"max_steps": 20, "save_steps": 5, "fsdp": divide}
    whole = train(recipe_of({**settings, "output_dir": str(tmp_path / "whole")}))
    program, recipe = tmp_path / "dies.py", tmp_path / "recipe.yaml"
    program.write_text(DIES.format(rank=rank, signal="SIGKILL"))
    recipe.write_text(recipe_of(settings).to_yaml())
    began = time.monotonic()
    done = torchrun(str(program), "train", str(recipe))
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    said = " ".join(done.stderr.split())
    assert said.count("error: another process of this run has ended") == 1
    assert f"slimtune train {settings['out']}/recipe.yaml --resume" in said
    assert [p.name for p in checkpoint.list_checkpoints(Path(settings["output_dir"]) / "checkpoints")][
        -1
    ] == "checkpoint-10"
    on = train(recipe_of(settings), resume=True)
    assert most(losses(whole["run"]), losses(on["run"])) < 1e-4
    assert apart(adapter(whole["run"]), adapter(on["run"])) < 1e-4


@pytest.mark.faults
def test_an_interrupt_of_one_process_stops_all_at_one_step(settings, tmp_path):
    settings["train"] |= {"max_steps": 20, "save_steps": 20}
    program, recipe = tmp_path / "dies.py", tmp_path / "recipe.yaml"
    program.write_text(DIES.format(rank=1, signal="SIGINT"))
    recipe.write_text(recipe_of(settings).to_yaml())
    (code, _, err), (other, _, silence) = ended(launched(str(program), "train", str(recipe)))
    assert (code, other) == (130, 130)
    assert "stopped at step 12; go on with: slimtune train" in err
    assert "stop" not in silence
    assert "error" not in silence
    assert [p.name for p in checkpoint.list_checkpoints(Path(settings["output_dir"]) / "checkpoints")][
        -1
    ] == "checkpoint-12"


def torchrun(*command: str) -> subprocess.CompletedProcess:
    """Run a command in two processes by torchrun itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    way = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*way, *command], env=env, capture_output=True, text=True, timeout=240)
