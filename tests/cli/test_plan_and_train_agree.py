"""`slimtune plan RECIPE FLAGS` plans the recipe that `slimtune train RECIPE FLAGS` trains, whatever the flags are."""

import re
import shlex

import pytest
from tiny_run import write_rows

from slimtune.cli import planned_jobs, train_command
from slimtune.cli.options import METHOD_FLAGS
from slimtune.cli.planned_jobs import JOB_SETTINGS
from slimtune.core.adapters.config_fields import list_settings
from slimtune.core.adapters.method_registry import list_methods
from slimtune.core.config import Recipe
from slimtune.core.config.objective_registry import list_objectives
from slimtune.core.training import train as train_module
from slimtune.errors import SlimtuneError

pytestmark = pytest.mark.filterwarnings("always:the recipe's")
NEEDED = {
    **dict.fromkeys(("grpo", "reinforce", "rloo"), " --set 'task.rewards=[length:9]'"),
    "context": " --set task.context=x",
    "distill": " --set task.teacher_model_name_or_path=base",
}
FLAGS: dict[str, list[str]] = {
    "model.device": ["--device=cpu"],
    "model.dtype": ["--dtype=bf16"],
    "model.quantization": ["--quantization=nf4"],
    "model.trust_remote_code": ["--trust-remote-code"],
    "data.train": ["--data=other.jsonl"],
    "data.format": ["--format=chat"],
    "data.columns": ["--column=messages=talk"],
    "data.ignore_columns": ["--ignore-columns=id"],
    "data.train_on": ["--train-on=last_assistant"],
    "data.max_seq_len": ["--max-seq-len=99"],
    "data.on_overlong": ["--on-overlong=truncate"],
    "data.apply_chat_template": ["--no-apply-chat-template"],
    "data.chat_template": ["--chat-template=t.jinja"],
    "task.name": [f"--task={name}{NEEDED.get(name, '')}" for name in list_objectives()],
    "method.name": [f"--method={name}" for name in (*list_methods(), "LoRA")],
    "method.rank": ["--rank=6"],
    "method.alpha": ["--alpha=5"],
    "train.epochs": ["--epochs=2"],
    "train.max_steps": ["--max-steps=9"],
    "train.batch_size": ["--batch-size=2"],
    "train.gradient_accumulation_steps": ["--gradient-accumulation-steps=3"],
    "train.max_tokens_per_micro_batch": ["--max-tokens-per-micro-batch=77"],
    "train.packing": ["--no-packing", "--packing"],
    "train.optimizer": ["--optimizer=adamw-8bit"],
    "train.gradient_checkpointing": ["--gradient-checkpointing"],
    "train.offload_activations": ["--offload-activations --gradient-checkpointing"],
    "train.mlp_tile_size": ["--mlp-tile-size=64"],
    "train.fsdp": ["--fsdp"],
    "--set": [
        "--set method=vera",
        "--set 'method={name: vera, r: 3}'",
        "--method=vera --rank=3",
        "--method=vera --set method.r=3 --set train.learning_rate=1e-3",
        "--method=ia3 --task=dpo --set task.beta=0.3",
        "--method=lora --rank=3",
        "--method=vera --set method.lora_alpha=3",
        "--set train.learning_rate=auto",
    ],
}
"""The flags to try, by what they set; each as a shell has them."""
RECIPE = """
model: {name: base, dtype: float32}
data: {train: rows.jsonl, max_seq_len: 512}
output_dir: o
task: {name: dpo, beta: 0.7}
method: {name: lora, r: 16, targets: [q_proj]}
train: {learning_rate: 2.0e-4, batch_size: 3}
"""


class _Stop(SlimtuneError):
    """Ends a command when its recipe is known."""


@pytest.fixture
def resolve(slimtune, tiny_folder, monkeypatch, tmp_path):
    """`resolve("plan", ["--rank=6"])`: the recipe as a tree, or the error's text, and what else stderr says."""
    tiny_folder.rename(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 8)
    (tmp_path / "other.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    resolved = []

    def stop(recipe, *args, **kwargs):
        resolved.append(recipe.to_dict())
        raise _Stop("the recipe is known")

    for command_module in (planned_jobs, train_command):  # the rows are of no task that the flags name
        monkeypatch.setattr(command_module, "require_valid_first_rows", lambda *args: None)
    monkeypatch.setattr(train_module, "train", stop)
    monkeypatch.setattr(planned_jobs, "_read_lengths", lambda recipe, model: stop(recipe))

    def resolve(command: str, words: list[str]) -> tuple[object, str]:
        resolved.clear()
        done = slimtune(command, "recipe.yaml", *words, columns=2000)
        assert done.exit_code in (1, 2), done.output
        error = done.stderr.partition("error: ")
        return (resolved[0] if resolved else error[2]), error[0]

    return resolve


def test_every_flag_that_both_take_is_tried():
    assert {*FLAGS} == {*JOB_SETTINGS, "model.device", *(f"method.{name}" for name in METHOD_FLAGS), "--set"}
    assert {*JOB_SETTINGS, "model.device"} <= {s.path for s in list_settings(Recipe)}


@pytest.mark.parametrize("path", FLAGS)
def test_same_flags_mean_the_same_recipe(path, resolve):
    for flags in FLAGS[path]:
        planned, trained = (resolve(command, shlex.split(flags)) for command in ("plan", "train"))
        assert planned == trained, flags


def find_paths(said: str) -> list[str]:
    """The settings that a text names."""
    return re.findall(r"\b(?:method|task|train)\.[a-z_]+", said)


def test_settings_of_a_replaced_method_are_named_and_dropped(resolve):
    """LoRA's rank and learning rate are no start for another method: `compare` does not use them either."""
    recipe, said = resolve("train", ["--method=vera"])
    assert Recipe.from_dict(recipe).method_config().r == 256
    assert recipe["train"]["learning_rate"] == "auto"
    assert recipe["task"]["beta"] == 0.7
    assert find_paths(said) == ["method.r", "method.targets", "train.learning_rate"]


def test_settings_of_a_replaced_task_are_dropped(resolve):
    recipe, said = resolve("train", ["--task=simpo"])
    assert (recipe["task"]["beta"], recipe["method"]["r"], recipe["train"]["learning_rate"]) == (2.0, 16, "auto")
    assert find_paths(said) == ["task.beta", "train.learning_rate"]


def test_what_flags_give_is_not_said_to_be_dropped(resolve):
    recipe, said = resolve("train", ["--method=vera", "--rank=3", "--lr=1e-3", "--set=method.targets=[v_proj]"])
    assert (recipe["method"]["r"], recipe["train"]["learning_rate"]) == (3, 1e-3)
    assert find_paths(said) == ["method.r"]


def test_the_same_method_keeps_its_settings(resolve):
    for words in ([], ["--method=lora"], ["--method=LoRA"], ["--set=method=lora"]):
        recipe, said = resolve("train", words)
        assert (recipe["method"]["r"], recipe["train"]["learning_rate"]) == (16, 2e-4)
        assert find_paths(said) == []
