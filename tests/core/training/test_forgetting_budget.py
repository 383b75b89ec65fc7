"""The forgetting budget: the kept adapter is inside it, as it was trained or with a reduced strength."""

import json
import string
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from row_files import write_jsonl
from tiny_run import distance, metrics, recipe_of, train_in_two_parts
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.core.adapters.peft_model import PeftModel, get_peft_model
from slimtune.core.training import best_adapter
from slimtune.core.training.loss import count_supervised_targets
from slimtune.core.training.train import train
from slimtune.errors import RecipeError
from slimtune.evaluation.general_text import TOKENS_OF_A_KIND, load_general_text
from slimtune.export.merge import merge
from slimtune.extras.adapter_strength import AdapterTensorInterpolator
from slimtune.methods.lora import LoraConfig
from slimtune.methods.lora.lora_modules import LinearLora


@pytest.fixture(scope="module")
def sure_base(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base that is sure of its next tokens, and a text of them in a file beside it: what it can forget."""
    folder, base, tokenizer = tmp_path_factory.mktemp("sure"), tiny_llama(), tiny_tokenizer()
    printable = tokenizer(string.ascii_letters)["input_ids"]
    with torch.no_grad():
        base.lm_head.weight *= 30
        ids = printable[:1]
        for _ in range(120):
            logits = base(torch.tensor([ids])).logits[0, -1, printable]
            ids.append(printable[logits.softmax(0).multinomial(1, generator=torch.Generator().manual_seed(len(ids)))])
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base")
    (folder / "general.txt").write_text(tokenizer.decode(ids))
    return folder


@pytest.fixture
def budgeted(settings, sure_base):
    """Settings of a run that forgets."""
    settings["model"]["name"] = str(sure_base / "base")
    settings["data"]["general_text"] = str(sure_base / "general.txt")
    settings["train"] |= {"epochs": 3, "eval_steps": 2, "forgetting_budget": 9.0, "save_total_limit": 9}
    return settings


def general_loss(model, base, file):
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(Path(file).read_text())["input_ids"])
    windows = [w[None] for w in ids.split(min(256, model.config.max_position_embeddings // 2))]
    with torch.no_grad():
        nats = sum(model(w, labels=w).loss.item() * (w.shape[1] - 1) for w in windows)
    return nats / sum(w.shape[1] - 1 for w in windows)


def measured_forgetting(run, recipe):
    """How much the saved adapter forgets, as transformers measures it."""
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    before = general_loss(base, recipe.model.name, recipe.data.general_text)
    tuned = PeftModel.from_pretrained(base, Path(run) / "adapter")
    return general_loss(tuned.eval(), recipe.model.name, recipe.data.general_text) - before


@pytest.mark.slow
def test_better_one_of_weaker_and_earlier_adapters_is_kept(budgeted, tmp_path, monkeypatch):
    free = train(recipe_of(budgeted))
    curve = dict(free.forgetting.measured)
    assert metrics(free.run, "forgetting") == list(curve.values())
    assert free.forgetting.strength == 1.0
    budget = (curve[4] + curve[6]) / 2  # it forgets more and more
    losses = dict(zip(curve, metrics(free.run, "validation_loss"), strict=True))
    inside = [losses[step] for step, forgetting in curve.items() if forgetting <= budget]
    recipe = recipe_of({**budgeted, "output_dir": str(tmp_path / "weaker")}, forgetting_budget=budget)
    weaker = train(recipe)
    assert weaker.validation_loss <= min(inside)
    assert measured_forgetting(weaker.run, recipe) == pytest.approx(weaker.forgetting.change, abs=1e-5)

    # An adapter without strength is worse than the checkpoints inside.
    def give_none(model, *_):
        AdapterTensorInterpolator(model, "default").set(0.0)
        return 0.0, []

    monkeypatch.setattr(best_adapter.STRENGTH_SEARCHES, "load", lambda _: give_none)
    recipe = recipe_of({**budgeted, "output_dir": str(tmp_path / "earlier")}, forgetting_budget=budget)
    earlier = train(recipe)
    assert (earlier.validation_loss, earlier.forgetting.strength) == (min(inside), 1.0)
    assert measured_forgetting(earlier.run, recipe) == pytest.approx(curve[earlier.best_step], abs=1e-5)


def test_strength_is_reduced_where_no_checkpoint_is_inside(budgeted, tmp_path):
    recipe = recipe_of(budgeted, forgetting_budget=0.02)
    result = train(recipe)
    found = result.forgetting
    assert found.before > 0.02 >= found.change > 0
    assert 0 < found.strength < 1
    assert measured_forgetting(result.run, recipe) == pytest.approx(found.change, abs=1e-5)
    assert f"{found.strength:.3f}" in (Path(result.run) / "train.log").read_text()
    assert "reduced" in (Path(result.run) / "report.html").read_text()
    merge(Path(result.run), tmp_path / "merged")
    ids = torch.arange(40, 90)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, Path(result.run) / "adapter").eval()
    with torch.no_grad():
        logps = [model(ids).logits.log_softmax(-1) for model in (plain, tuned)]
    assert (logps[0] - logps[1]).abs().max() < 1e-5
    assert train(recipe, resume=True).forgetting == found


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "lora"}, {"name": "p_tuning", "num_virtual_tokens": 4}])
def test_interrupted_run_resumes_to_the_same_adapter(budgeted, tmp_path, monkeypatch, method):
    budgeted["method"] = method
    whole = train(recipe_of({**budgeted, "output_dir": str(tmp_path / "whole")}, forgetting_budget=0.02))
    resumed = train_in_two_parts(recipe_of(budgeted, forgetting_budget=0.02), monkeypatch, 4)
    assert distance(resumed.run, whole.run) == 0
    assert resumed.forgetting == whole.forgetting
    assert metrics(resumed.run, "forgetting") == metrics(whole.run, "forgetting")


@pytest.mark.slow
def test_measuring_changes_no_step(budgeted, tmp_path):
    with_budget = train(recipe_of(budgeted))
    del budgeted["data"]["general_text"]
    without = train(recipe_of({**budgeted, "output_dir": str(tmp_path / "without")}, forgetting_budget=None))
    assert metrics(with_budget.run, "train_loss") == metrics(without.run, "train_loss")
    assert without.forgetting is None


def test_preference_run_without_validation_rows(budgeted, tmp_path):
    pairs = [{"prompt": f"say {i}", "chosen": "abc " * (1 + i % 3), "rejected": "#?!"} for i in range(12)]
    rows = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    budgeted["data"] |= {"train": str(rows), "validation": None, "validation_fraction": 0.0}
    recipe = recipe_of({**budgeted, "task": {"name": "dpo"}}, forgetting_budget=1e-3, eval_steps=None)
    result = train(recipe)
    assert 0 < result.forgetting.strength < 1
    assert result.forgetting.change <= 1e-3 < result.forgetting.before
    assert measured_forgetting(result.run, recipe) == pytest.approx(result.forgetting.change, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "classification"}}, "no loss on text"),
        ({"train": {"forgetting_budget": 0.1, "fsdp": True}}, "train.fsdp is true"),
        ({"train": {"forgetting_budget": 0}}, "train.forgetting_budget"),
        ({"train": {"forgetting_budget": None}}, "general_text"),
    ],
)
def test_refused_recipes(budgeted, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of({**budgeted, **changes})


@pytest.mark.parametrize(("method", "rate"), [("prompt_tuning", 0.3), ("p_tuning", 0.05), ("prefix_tuning", 0.05)])
def test_prompt_moves_back_toward_its_start(budgeted, tmp_path, method, rate):
    budgeted |= {"method": {"name": method, "num_virtual_tokens": 4}}
    budgeted["train"] |= {"learning_rate": rate, "eval_steps": None}
    budgeted["data"] |= {"validation": None, "validation_fraction": 0.0}
    start = train(recipe_of(budgeted, forgetting_budget=99.0, learning_rate=1e-12)).forgetting.before
    free = train(
        recipe_of({**budgeted, "output_dir": str(tmp_path / "free")}, forgetting_budget=99.0)
    ).forgetting.before
    recipe = recipe_of({**budgeted, "output_dir": str(tmp_path / "b")}, forgetting_budget=max(start, 0) / 2 + free / 2)
    result = train(recipe)
    assert start < result.forgetting.change <= result.forgetting.budget < result.forgetting.before
    assert 0 < result.forgetting.strength < 1
    assert measured_forgetting(result.run, recipe) == pytest.approx(result.forgetting.change, abs=1e-5)


def test_prompt_whose_start_is_outside_the_budget_is_its_start(budgeted):
    budgeted |= {"method": {"name": "prompt_tuning", "num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"}}
    found = train(recipe_of(budgeted, forgetting_budget=1e-9)).forgetting
    assert found.strength == 0
    assert found.tried[-1] == (0, found.change)


def test_a_budget_that_nobody_named_is_kept_and_measured_once(budgeted):
    result = train(recipe_of(budgeted, forgetting_budget="auto"))
    assert (result.forgetting.budget, result.forgetting.measured) == (0.1, [])
    assert result.forgetting.before > 0.1 >= result.forgetting.change > 0
    assert 0 < result.forgetting.strength < 1


def test_adapter_without_strength_is_measured_with_every_validation(budgeted, monkeypatch):
    monkeypatch.setattr(LinearLora, "has_strength", False)
    result = train(recipe_of(budgeted, forgetting_budget="auto"))
    assert [step for step, _ in result.forgetting.measured] == list(range(2, 13, 2))


def test_built_in_rows_are_few_and_of_every_kind(settings, tiny_llama, tiny_tokenizer):
    model = get_peft_model(tiny_llama(max_position_embeddings=4096), LoraConfig())
    rows = load_general_text(None).choose_rows(recipe_of(settings), tiny_tokenizer(), model, print)
    tokens = Counter()
    for row in rows:
        tokens[row["kind"]] += count_supervised_targets(row)
    assert set(tokens) == {"prose", "instructions", "python", "javascript", "languages"}
    assert all(n == pytest.approx(TOKENS_OF_A_KIND, rel=0.5) for n in tokens.values())


def test_the_kind_of_text_that_is_forgotten_most_counts(budgeted, tmp_path, sure_base):
    """What the run learns of one kind does not make up for what it forgets of another."""
    sure, mixed = sure_base / "general.txt", tmp_path / "mixed.jsonl"
    rows = Path(budgeted["data"]["train"]).read_text().splitlines()
    learned = " ".join(json.loads(line)["messages"][-1]["content"] for line in rows)
    pieces = [{"kind": "sure", "text": sure.read_text()}, *({"kind": "learned", "text": learned} for _ in range(20))]
    mixed.write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    budgeted["data"]["general_text"] = str(mixed)
    recipe = recipe_of(budgeted, forgetting_budget=0.02)
    result = train(recipe)
    found = result.forgetting
    assert found.before > 0.02 >= found.change > 0
    assert set(found.base_losses) == {"sure", "learned"}
    same = recipe_of({**budgeted, "data": {**budgeted["data"], "general_text": str(sure)}}, forgetting_budget=0.02)
    assert measured_forgetting(result.run, same) == pytest.approx(found.change, abs=1e-5)
