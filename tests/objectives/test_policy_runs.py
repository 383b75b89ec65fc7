"""Runs on sampled answers: the sampler is the model that trains, faults are caught, killed runs resume bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from objective_steps import take_step
from row_files import write_jsonl
from tiny_families import build_family
from tiny_run import distance, metrics, recipe_of, train_in_two_parts

from slimtune import LoraConfig, get_peft_model
from slimtune.core.adapters.active_adapters import BASE_ROW
from slimtune.core.config import load_recipe
from slimtune.core.config.objective_registry import load_objective_class
from slimtune.core.data.collator import Collator
from slimtune.core.foundation.strict_yaml import format_yaml
from slimtune.core.training.loss import make_collator
from slimtune.core.training.train import train
from slimtune.errors import DataError, RecipeError, RunError, UsageError
from slimtune.evaluation.eval_result import read_eval_result
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.evaluation.sampled_answer_comparison import SampledAnswerComparison
from slimtune.extras.rewards.reward_workers import RewardWorkers
from slimtune.generation import policy_sampler
from slimtune.objectives import policy_run
from slimtune.objectives.grpo import GRPO
from slimtune.objectives.reinforce import Reinforce
from slimtune.objectives.reward_probes import DESCRIPTIONS, REWARD_PROBES, describe_fired_probes, score_probes

REWARD = """
def variety(prompts, completions, wanted, **columns):
    print("a reward may print")
    return [len(set(text)) / n for text, n in zip(completions, wanted, strict=True)]

def broken(prompts, completions, wanted, **columns):
    return [1 / (n - 13) for n in wanted]

def nan(prompts, completions, **columns):
    return [float("nan") if i == 3 else 1.0 for i in range(len(completions))]

def short(prompts, completions, **columns):
    return [1.0]

def hanging(prompts, completions, wanted, **columns):
    import time
    time.sleep(60 if 12 in wanted else 0)
    return [1.0] * len(completions)

def constant(prompts, completions, **columns):
    return [0.5] * len(completions)
"""


@pytest.fixture
def make(tmp_path, tiny_llama, tiny_tokenizer):
    """Make a recipe in a run folder: `make("run", reward="variety", task={"beta": 0.1}, max_steps=3)`."""
    for part in (tiny_llama(initializer_range=0.2), tiny_tokenizer()):  # so wide that positions matter
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "rewards.py").write_text(REWARD)
    rows = [{"prompt": f"say {i}", "wanted": 10 + i % 5} for i in range(10)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)

    def recipe(name, *, reward="variety", task=None, method=None, data=None, **train_settings):
        settings = {
            "model": {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(tmp_path / "prompts.jsonl"), "validation_fraction": 0.2, **(data or {})},
            "task": {
                "name": "grpo", "rewards": [f"{tmp_path}/rewards.py:{reward}"], "num_generations": 4,
                "max_completion_length": 8, **(task or {}),
            },
            "method": {"name": "lora", "r": 4, **(method or {})},
            "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 2e-2, "forgetting_budget": None},
            "output_dir": str(tmp_path / name),
        }  # fmt: skip
        return recipe_of(settings, **train_settings)

    return recipe


@pytest.mark.parametrize("task", [{"beta": 0.1, "temperature": 0.7}, {"name": "rloo"}], ids=["grpo", "rloo"])
def test_sampler_is_the_model_that_trains(make, task):
    result = train(make("run", task=task, max_steps=6))
    largest = metrics(result.run, "sampling/sampling_logp_difference/max")
    assert len(largest) == 6
    assert max(largest) < 1e-5
    assert metrics(result.run, "kl")[0] == pytest.approx(0, abs=1e-9)
    assert metrics(result.run, "kl")[-1] > 1e-4
    assert len(metrics(result.run, "reward")) == 8  # and twice of the held-out prompts


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_sampler_and_trainer_differ_by_rounding_alone(family, make, tmp_path):
    """Their norms are in float64, too; those of Llama are in float32 whatever the base's dtype is."""
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    build_family(family, vocab_size=320).save_pretrained(tmp_path / "base")
    recipe = make("run", method={"target_modules": "all-linear"}, max_steps=6)
    result = train(replace(recipe, model=replace(recipe.model, dtype="float64")))
    assert max(metrics(result.run, "sampling/sampling_logp_difference/max")) < 1e-12


@pytest.mark.parametrize("task", ["grpo", "rloo", "reinforce"])
def test_killed_run_resumes_to_the_same_bits(make, task, monkeypatch):
    whole, again = (make(name, task={"name": task, "beta": 0.05}) for name in ("whole", "again"))
    result = train(whole)
    assert distance(result.run, train_in_two_parts(again, monkeypatch, 2).run) == 0
    assert metrics(whole.output_dir, "reward") == metrics(again.output_dir, "reward")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("shared", [True, False], ids=["one prompt", "prompts of their own"])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_answers_in_one_tree_are_learned_as_alone(name, shared, family):
    model = get_peft_model(
        build_family(family).float(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    objective = load_objective_class(name)(rewards=["length:9"], beta=0.1)
    random, examples = torch.Generator().manual_seed(0), []
    for i, length in enumerate((5, 9, 1, 7)):
        seed = torch.Generator().manual_seed(0 if shared else i)
        prompt = {"input_ids": torch.randint(3, 96, (12,), generator=seed).tolist(), "line": i}
        ids = torch.randint(3, 96, (length,), generator=random).tolist()
        noise = (torch.randn(3, 9, generator=random) * 0.3 - 4).tolist()
        example = policy_run.make_answer_example(prompt, policy_run.SampledAnswer(ids, [], "", True), i)
        examples.append(example | {"advantage": i - 1.5, "sampled_logps": noise[0], "reference_logps": noise[1]})
    tree, alone = make_collator(model, 0), Collator(0, packing=False)
    assert tree.count_tokens(examples) == 22 + 12 * (1 if shared else 4)
    loss, gradients = take_step(model.train(), examples, objective, tree)
    other_loss, other_gradients = take_step(model, examples, objective, alone, [[0], [1], [2], [3]])
    assert loss == pytest.approx(other_loss, rel=1e-5, abs=1e-5)
    for name, gradient in gradients.items():
        scale = float(other_gradients[name].abs().max())
        torch.testing.assert_close(gradient, other_gradients[name], atol=1e-5 * scale + 1e-7, rtol=1e-4)


def test_longest_step_shares_prompts_and_no_answers():
    objective = GRPO(rewards=["length:9"], num_generations=4, max_completion_length=8)
    prompts = [{"input_ids": [n, *range(10, 20)], "labels": [-100] * 11, "line": n} for n in (1, 2)]
    examples = objective.make_longest_examples(prompts)
    assert Collator(0, with_packed_layout=True).count_tokens(examples) == 2 * (11 + 4 * 8)


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {}
sample = policy_sampler.sample_policy_answers


def fault(function):
    FAULTS[function.__name__] = function
    return function


def change_weights(model, change):
    """Sample with other weights of the adapter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            change(p)
    return lambda: [p.data.copy_(old) for p, old in zip(parameters, kept, strict=True)]


@fault
def adapter_off(model, tokenizer, prompts, how):
    return sample(model, tokenizer, prompts, replace(how, adapter_or_base=BASE_ROW))


@fault
def one_step_old(model, tokenizer, prompts, how):
    restore = change_weights(model, lambda p: p.copy_(model.weights_before[id(p)]))
    found = sample(model, tokenizer, prompts, how)
    restore()
    return found


@fault
def scale_wrong(model, tokenizer, prompts, how):
    restore = change_weights(model, lambda p: p.mul_(2**0.5))
    found = sample(model, tokenizer, prompts, how)
    restore()
    return found


@fault
def other_adapter(model, tokenizer, prompts, how):
    restore = change_weights(model, lambda p: p.copy_(p.flip(0)))
    found = sample(model, tokenizer, prompts, how)
    restore()
    return found


@fault
def other_dtype(model, tokenizer, prompts, how):
    with torch.autocast("cpu", torch.bfloat16):
        return sample(model, tokenizer, prompts, how)


@fault
def position_offset_after_the_prefix(model, tokenizer, prompts, how):
    def shift(module, args, kwargs):
        positions = kwargs.pop("position_ids", args[-1])
        return (args[0], positions + (positions.shape[1] == 1)), kwargs

    (rotary,) = [m for name, m in model.named_modules() if name.endswith("rotary_emb")]
    hook = rotary.register_forward_pre_hook(shift, with_kwargs=True)
    found = sample(model, tokenizer, prompts, how)
    hook.remove()
    return found


@fault
def temperature_forgotten(model, tokenizer, prompts, how):
    return sample(model, tokenizer, prompts, replace(how, temperature=1.0))


@fault
def template_twice(model, tokenizer, prompts, how):
    return sample(model, tokenizer, [[*ids[:6], *ids] for ids in prompts], how)


LEARNING_FAULTS = {
    "tokens_re_encoded": lambda answer, tokenizer: tokenizer(answer.text)["input_ids"] + answer.token_ids[-1:],
    "dropped_eos": lambda answer, tokenizer: answer.token_ids[:-1],
}
FAULTY_STEP = 3


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_sampler_is_caught_in_its_step(name, make, monkeypatch):
    calls = []

    def sample_faulty(model, tokenizer, prompts, how):
        calls.append(prompts)
        now = FAULTS[name] if len(calls) == FAULTY_STEP else sample
        found = now(model, tokenizer, prompts, how)
        model.weights_before = {id(p): p.detach().clone() for p in model.parameters() if p.requires_grad}
        return found

    monkeypatch.setattr(policy_sampler, "sample_policy_answers", sample_faulty)
    assert_caught(make("run", task={"temperature": 0.8}))


@pytest.mark.parametrize("name", LEARNING_FAULTS)
def test_fault_of_what_is_learned_is_caught_in_its_step(name, make, monkeypatch, tiny_tokenizer):
    tokenizer, steps = tiny_tokenizer(), []
    make_example = policy_run.make_answer_example

    def make_faulty(prompt, answer, number):
        steps.extend([1] * (number == 0))
        if len(steps) == FAULTY_STEP and len(answer.token_ids) > 1:
            answer = policy_run.SampledAnswer(
                LEARNING_FAULTS[name](answer, tokenizer), answer.logps, answer.text, answer.is_complete
            )
        return make_example(prompt, answer, number)

    monkeypatch.setattr(policy_run, "make_answer_example", make_faulty)
    assert_caught(make("run"))


def assert_caught(recipe):
    with pytest.raises(RunError) as caught:
        train(recipe)
    assert caught.value.code == "sampler-differs"
    assert len(metrics(recipe.output_dir, "train_loss")) == FAULTY_STEP - 1


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "line"), [("broken", True), ("nan", True), ("short", False), ("hanging", True)])
def test_reward_that_fails_is_named_with_its_row(reward, line, make):
    with pytest.raises(RunError) as caught:
        train(make("run", reward=reward, task={"reward_timeout": 3}, max_steps=40))
    assert caught.value.code == "reward-failed"
    assert f"rewards.py:{reward}" in caught.value.message
    assert ("prompts.jsonl" in caught.value.message) == line


def test_gradient_of_nan_is_named_and_its_step_skipped(make, monkeypatch):
    loss = GRPO.loss

    def fail(self, values, batch, items):
        fails = values.requires_grad and self.run.prepared.state.step == 1
        return loss(self, values, batch, items) * (float("nan") if fails else 1)

    monkeypatch.setattr(GRPO, "loss", fail)
    result = train(make("run", on_nonfinite="skip"))
    assert (result.steps, result.skipped_steps) == (4, 1)


@pytest.mark.parametrize("task", ["grpo", "reinforce"])
def test_run_without_signal_stops(task, make):
    with pytest.raises(RunError) as caught:
        train(make("run", reward="constant", task={"name": task}, max_steps=40, batch_size=2))
    assert caught.value.code == "no-reward-signal"


def test_baseline_of_reinforce_is_the_mean_of_the_steps_before(make, monkeypatch):
    task = {"name": "reinforce", "num_generations": 1, "baseline_decay": 0.5, "beta": 0.0}
    seen = []
    compute = Reinforce.compute_advantages
    monkeypatch.setattr(
        Reinforce,
        "compute_advantages",
        lambda self, rewards, ratios: (seen.append((rewards, found := compute(self, rewards, ratios))), found)[1],
    )
    train(make("run", task=task, max_steps=3))
    means = [float(rewards.mean()) for rewards, _ in seen]
    baselines = [float((rewards - advantages).mean()) for rewards, advantages in seen]
    assert baselines == pytest.approx([means[0], means[0], 0.5 * means[0] + 0.5 * means[1]])


def test_rewards_are_weighted(make, tmp_path):
    path = f"{tmp_path}/rewards.py"
    both = {"rewards": [f"{path}:constant", f"{path}:variety"], "reward_weights": [2.0, 0.0]}
    result = train(make("run", task=both, max_steps=1, data={"validation_fraction": 0.0}))
    assert metrics(result.run, "reward") == [1.0]
    assert metrics(result.run, "rewards/constant/mean") == [0.5]
    assert metrics(result.run, "rewards/variety/mean")[0] > 0


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (RecipeError, {"task": {"rewards": []}}),
        (RecipeError, {"task": {"rewards": ["numeric-mach:answer"]}}),
        (RecipeError, {"task": {"rewards": ["nowhere.py:reward"]}}),
        (RecipeError, {"task": {"reward_weights": [1.0, 2.0]}}),
        (UsageError, {"method": {"lora_dropout": 0.1}}),
        (RunError, {"task": {"rewards": ["exact-match:wnated"]}}),
        (RunError, {"reward": "no_such_function"}),
        (DataError, {"task": {"max_completion_length": 1020}}),
    ],
    ids=["no reward", "misspelled", "no file", "weights", "dropout", "no column", "no function", "no room"],
)
def test_bad_settings_are_refused_before_anything_is_written(error, how, make, tmp_path):
    with pytest.raises(error):
        train(make("run", **how))
    assert not (tmp_path / "run").exists()


def test_misspelled_column_is_named_with_the_nearest(make):
    with pytest.raises(RunError, match="mean 'wanted'") as caught:
        train(make("run", task={"rewards": ["exact-match:wnated"]}))
    assert "--resume" not in caught.value.hint


def test_reward_beside_the_recipe_is_found(make, tmp_path, monkeypatch):
    tree = make("run").to_dict()
    tree["task"]["rewards"] = ["rewards.py:variety"]
    (tmp_path / "recipe.yaml").write_text(format_yaml(tree))
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "recipe.yaml").objective().rewards == [f"{tmp_path}/rewards.py:variety"]


@pytest.mark.parametrize("task", ["grpo", "rloo"])
def test_evaluation_compares_rewards_of_base_and_tuned_model(make, task):
    run = train(make("run", task={"name": task}, data={"validation_fraction": 0.5}, max_steps=2)).run
    found = evaluate(run, EvalSettings(split="validation"))
    m = found.measures
    assert (m.rows, m.answers, m.rewards) == (5, 4, ["variety"])
    assert m.reward_gain.value == pytest.approx(m.tuned_reward.value - m.base_reward.value)
    assert m.base_best_reward.value >= m.base_reward.value > 0
    assert read_eval_result(json.loads((Path(run) / "eval-validation.json").read_text())) == found


def test_reward_that_empty_answers_please_is_told(make):
    data = {"validation_fraction": 0.5}
    run = train(make("run", task={"rewards": ["length:3"]}, data=data, max_steps=1)).run
    assert DESCRIPTIONS["empty"] in Path(run, "train.log").read_text()
    found = evaluate(run, EvalSettings(split="validation"))
    probes = {probe.name: probe for probe in found.measures.probes}
    assert [*probes] == [*REWARD_PROBES]
    assert (probes["empty"].reward, probes["longest"].reward) == (1, 0)
    assert probes["empty"].gain.low > 0
    assert len(SampledAnswerComparison.list_warnings(found.measures)) >= 1


def test_probes_of_a_reward_for_right_answers_do_not_fire():
    answers = [[policy_run.SampledAnswer([], [], text, True) for text in ("It is 7.", "8")] for _ in range(4)]
    prompts = [{"record": json.dumps({"prompt": "What is 3 + 4?", "answer": 7}), "line": i} for i in range(4)]
    objective = load_objective_class("grpo")(rewards=["numeric-match:answer"])
    workers = RewardWorkers(objective.rewards, [], 60.0)
    probes = score_probes(objective, workers, prompts, answers, "rows")
    assert {name: float(rewards.mean()) for name, rewards in probes.items()} == {
        "empty": 0, "longest": 0, "repeated": 0.5, "echo": 0, "format": 0,
    }  # fmt: skip
    assert describe_fired_probes(probes, torch.tensor([[1.0, 0.0]] * 4)) == []


def test_best_and_worst_answers_are_recorded(make):
    run = train(make("run", max_steps=2)).run
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line.get("event") == policy_run.EVENT]
    assert [line["step"] for line in found] == [1, 2]
    assert all(line["best"]["reward"] >= line["worst"]["reward"] for line in found)
