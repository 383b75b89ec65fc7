"""Runs of every task: they learn, resume, recover memory, quantize, train learned prompts, and write what they say."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from objective_cases import OBJECTIVE_CASES, ROWS
from safetensors.numpy import load_file
from tiny_run import distance, interrupt_at, metrics, recipe_of, train_in_two_parts, train_until
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from slimtune.core.config.objective_registry import list_objectives, load_objective_class
from slimtune.core.data.tokenized_dataset import list_tokens_and_labels_by_row
from slimtune.core.training.datasets import tokenize_recipe_datasets
from slimtune.core.training.default_learning_rate import fill_in_learning_rate
from slimtune.core.training.train import InterruptedAfterCheckpoint, train
from slimtune.core.training.trained_model import load_run
from slimtune.core.training.training_loop import TrainingLoop
from slimtune.errors import DataError, RunError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.export.merge import merge
from slimtune.objectives.pair_objective import PairObjective
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.plan_request import build_plan_request
from slimtune.planning.planner import estimate_resources

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


TASKS = pytest.mark.parametrize("task", ["dpo", "kto", "reward", "classification"])
DROPOUT = {"name": "lora", "r": 4, "lora_dropout": 0.1}


@pytest.fixture
def make(tmp_path, tiny_folder, tiny_llama):
    """Make a recipe of a task in a run folder: `make("dpo", "run", rows="lists", packing=False)`."""

    def recipe(task, name, *, rows=None, data=None, method=None, quantization=None, dtype="float32", **more):
        rows = rows or OBJECTIVE_CASES[task if isinstance(task, str) else task["name"]].rows
        if isinstance(task, str):
            given = OBJECTIVE_CASES[task].settings
            if "TEACHER" in given.values():
                for part in (tiny_llama(initializer_range=0.1), AutoTokenizer.from_pretrained(tiny_folder)):
                    part.save_pretrained(tmp_path / "teacher")
            task = {"name": task, **{k: str(tmp_path / "teacher") if v == "TEACHER" else v for k, v in given.items()}}
        file = tmp_path / f"{rows}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[rows]))
        settings = {
            "model": {"name": str(tiny_folder), "dtype": dtype, "device": "cpu", "quantization": quantization},
            "data": {"train": str(file), "validation_fraction": 0.25, **(data or {})},
            "task": task,
            "method": method or {"name": "lora", "r": 4},
            "train": {
                "max_steps": 4,
                "batch_size": 6,
                "learning_rate": 1e-2,
                "max_tokens_per_micro_batch": 200,
                "forgetting_budget": None,
            },
            "output_dir": str(tmp_path / name),
        }
        return recipe_of(settings, **more)

    return recipe


FAST_OF_TWO = pytest.mark.parametrize(
    "task", [t if t in ("sft", "dpo") else pytest.param(t, marks=pytest.mark.slow) for t in OBJECTIVE_CASES]
)


FAST_OF_TWO_NOT_SAMPLED = pytest.mark.parametrize(
    "task",
    [
        t if t in ("sft", "dpo") else pytest.param(t, marks=pytest.mark.slow)
        for t, case in OBJECTIVE_CASES.items()
        if case.rows != "prompts"  # other numbers sample other answers
    ],
)


@FAST_OF_TWO_NOT_SAMPLED
def test_a_run_in_float16_loses_what_one_in_float32_does(make, task):
    half, single = (train(make(task, dtype, dtype=dtype)) for dtype in ("float16", "float32"))
    assert half.validation_loss == pytest.approx(single.validation_loss, abs=1e-2)


@pytest.mark.slow
def test_a_quantized_base_trains_in_float16(make):
    half, single = (train(make("sft", dtype, dtype=dtype, quantization="nf4")) for dtype in ("float16", "float32"))
    assert half.validation_loss == pytest.approx(single.validation_loss, abs=1e-2)


@FAST_OF_TWO_NOT_SAMPLED
def test_packed_run_equals_padded(make, task):
    """The same rows in one sequence, with shared prompts, and in a padded batch: one loss, one adapter."""
    packed, padded = (
        train(make(task, f"run-{packing}", packing=packing, max_steps=2)).run for packing in (True, False)
    )
    assert metrics(packed, "train_loss") == pytest.approx(metrics(padded, "train_loss"), abs=1e-4)
    assert distance(packed, padded) < 1e-3


@FAST_OF_TWO
def test_is_planned(make, task):
    recipe = make(task, "run")
    estimate = estimate_resources(
        build_plan_request(recipe, require_gpu_by_name("rtx-3090"), [(9, 5, 7)] * 6), advise="none"
    )
    assert (estimate.verdict, estimate.method) == ("fits", "lora")


@pytest.mark.parametrize("task", OBJECTIVE_CASES)
def test_merged_run_is_what_was_trained(make, task, tmp_path):
    run = train(make(task, "run", max_steps=2)).run
    if OBJECTIVE_CASES[task].exports:
        assert merge(run, tmp_path / "merged").comparison.strength == pytest.approx(1, abs=0.01)
    else:
        assert load_run(run).model.merge_and_unload().config.num_labels >= 1


@pytest.mark.parametrize(
    ("rows", "task", "first_loss", "beta", "reference"),
    [
        ("pairs", "dpo", np.log(2), 0.1, {"train": (18, 2), "validation": (6, 2)}),
        pytest.param("lists", "dpo", np.log(2), 0.1, {"train": (18, 3), "validation": (6, 3)}, marks=pytest.mark.slow),
        pytest.param(
            "rated",
            {"name": "kto", "beta": 0.5},
            0.5,
            0.5,
            {"train": (23, 2), "validation": (8, 2)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pairs", "lists", "rated"],
)
def test_run_learns_and_resumes_bit_for_bit(make, rows, task, first_loss, beta, reference, monkeypatch):
    whole, again = (make(task, n, rows=rows, method=DROPOUT, max_steps=None, epochs=3) for n in ("whole", "again"))
    result = train(whole)
    folder = Path(result.run)
    assert metrics(folder, "train_loss")[0] == pytest.approx(first_loss, abs=0.1)  # dropout alone makes a difference
    assert result.validation_loss < first_loss - 0.09
    written = load_file(folder / "reference.safetensors")
    assert {part: values.shape for part, values in written.items()} == reference
    assert np.isnan(written["train"]).any() == (rows == "lists")  # of two answers, or three

    found, page = evaluate(folder, EvalSettings(split="validation")), (folder / "report.html").read_text()
    if rows == "rated":
        measures = found.measures.unpaired_preference
        # Higher rewards alone are no separation: the good answers must be likelier than the bad ones more often, too.
        assert found.improved is (max(measures.auc_gain.value, measures.token_auc_gain.value) > 0)
        assert found.measures.rows == measures.good
        assert measures.reward_auc.value == 1
        assert len(metrics(folder, "kl")) == 3
        assert "likelier" in page
        gain = measures.margin
    else:
        measures = found.measures.preference
        assert found.improved
        assert found.measures.prompt_dependence is None
        assert measures.margin_gain.low > 0
        assert "dpo, beta 0.1" in page
        gain = measures.tuned_margin.value - measures.base_margin.value
        assert metrics(folder, "rewards/accuracies")[-1] > (0.8 if rows == "lists" else 0.99)
        if rows == "pairs":
            assert found.measures.rows == measures.pairs == measures.pairs_better == 6
    assert metrics(folder, "rewards/margins")[-1] == pytest.approx(beta * gain, rel=1e-4)  # beta times the log ratios

    train_in_two_parts(again, monkeypatch, 5)
    assert distance(folder, again.output_dir) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reward", "classification"])
def test_interrupted_run_ends_as_the_undisturbed_one(make, task, monkeypatch):
    whole, again = make(task, "whole", method=DROPOUT), make(task, "again", method=DROPOUT)
    train(whole)
    train_in_two_parts(again, monkeypatch, 2)
    assert distance(whole.output_dir, again.output_dir) == 0


def test_reference_of_other_rows_is_refused(make, monkeypatch, tmp_path):
    recipe = make("dpo", "run", data={"validation_fraction": 0.0})  # then, too, a run has a reference
    interrupt_at(monkeypatch, 1)
    with pytest.raises(InterruptedAfterCheckpoint):
        train(recipe)
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text().replace("abc", "abd"))
    with pytest.raises(UsageError, match="rows"):
        train(recipe, resume=True)
    with pytest.raises(RunError, match="log-probabilities"):
        train(recipe, resume=True, accept_changed=["rows"])


def test_sft_learns_the_chosen_answers_of_pairs_if_their_format_is_named(make):
    with pytest.raises(DataError, match=r"preference.*\bsft\b") as refused:
        train(make("sft", "pairs", rows="pairs"))
    assert "--format preference" in refused.value.hint
    run = Path(train(make("sft", "pairs", rows="pairs", data={"format": "preference"})).run)
    assert distance(run, train(make("sft", "chats", rows="chats")).run) == 0
    found = evaluate(run, EvalSettings(split="validation", bootstrap=50))
    assert found.measures.preference.pairs == 6
    margins = [row["tuned_margin"] for row in json.loads((run / "scores-validation.json").read_text())]
    assert np.mean(margins) == pytest.approx(found.measures.preference.tuned_margin.value)


def is_pair_task_without_reference(task):
    cls = load_objective_class(task)
    return cls.task_type == "CAUSAL_LM" and issubclass(cls, PairObjective) and not cls.needs_reference


@pytest.mark.slow
@pytest.mark.parametrize("task", [t for t in list_objectives() if is_pair_task_without_reference(t)])
def test_objectives_without_a_reference(make, task):
    result = train(make(task, "run", method=DROPOUT, max_steps=6))
    assert metrics(result.run, "rewards/accuracies")[-1] == 1
    assert not Path(result.run, "reference.safetensors").exists()


def test_best_against_worst_trains_two_answers_of_a_list(make):
    result = train(make({"name": "dpo", "pairs": "best-worst"}, "run", rows="lists", max_steps=2))
    assert load_file(Path(result.run) / "reference.safetensors")["train"].shape == (18, 2)
    preference = evaluate(Path(result.run), EvalSettings(split="validation")).measures.preference
    assert preference.pairs == 6


def test_settings_of_dpo_are_checked(make):
    with pytest.raises(UsageError, match=r"task\.label_smoothing: .*0\.1.*sigmoid"):
        make({"name": "dpo", "label_smoothing": 0.1}, "run")
    with pytest.raises(UsageError, match=r"data\.format: .*'chat'.*dpo"):
        make("dpo", "run", data={"format": "chat"})
    recipe = make("dpo", "run", learning_rate="auto")
    assert fill_in_learning_rate(recipe, row_count=32, hidden_size=64).train.learning_rate == 1.5e-3


@pytest.mark.slow
@TASKS
def test_step_that_runs_out_of_memory_is_repeated(make, task, monkeypatch):
    calm, short = make(task, "calm"), make(task, "short")
    train(calm)
    forward, train_step, calls = LlamaDecoderLayer.forward, TrainingLoop.train_step, []

    def fail(layer, *args, **kwargs):
        calls.append(layer)
        if len(calls) == 3:  # in the second micro-batch of the step, or in the second layer of a repeated one
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(layer, *args, **kwargs)

    def fail_in_step(loop, rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", fail)
            return train_step(loop, rows)

    monkeypatch.setattr(TrainingLoop, "train_step", fail_in_step)
    train(short)
    assert len(metrics(short.output_dir, "error")) == 1
    assert distance(calm.output_dir, short.output_dir) < 1e-5
    assert metrics(short.output_dir, "train_loss") == pytest.approx(metrics(calm.output_dir, "train_loss"), abs=1e-5)


@pytest.mark.slow
@TASKS
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_learned_prompts_train_packed_as_padded(make, task, name):
    method = {"name": name, "num_virtual_tokens": 4}
    runs = [train(make(task, out, method=method, packing=packing)).run for out, packing in (("a", None), ("b", False))]
    losses, padded = (metrics(run, "train_loss") + metrics(run, "validation_loss") for run in runs)
    assert losses == pytest.approx(padded, abs=1e-5)
    assert distance(*runs) < 1e-4
    evaluate(Path(runs[0]), EvalSettings(split="validation", bootstrap=20))


@pytest.mark.slow
@TASKS
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_base_learns(make, task, kind):
    run = train(make(task, "run", quantization=kind)).run
    losses = metrics(run, "train_loss")
    assert losses[-1] < losses[0] - 0.02
    assert evaluate(Path(run), EvalSettings(split="validation", bootstrap=20)).quantization == kind


def test_truncated_reference_is_computed_again(make, monkeypatch, capfd):
    whole, again = (make("dpo", name, max_steps=3) for name in ("whole", "again"))
    written = load_file(Path(train(whole).run, "reference.safetensors"))
    file = train_until(again, monkeypatch, 1) / "reference.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    train(again, resume=True)
    assert "reference.safetensors" in capfd.readouterr().err
    assert all(np.array_equal(values, written[part], equal_nan=True) for part, values in load_file(file).items())


@pytest.mark.slow
def test_reference_of_a_continued_adapter_is_what_peft_computes(make, tiny_folder):
    first = train(make("orpo", "first")).run
    recipe = make("dpo", "second", max_steps=1)
    train(recipe, init_adapter=Path(first))
    assert metrics(recipe.output_dir, "train_loss")[0] == pytest.approx(np.log(2), abs=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, Path(first) / "adapter").double().eval()
    data = tokenize_recipe_datasets(recipe, AutoTokenizer.from_pretrained(tiny_folder))
    reference = load_file(Path(recipe.output_dir) / "reference.safetensors")
    for part in ("train", "validation"):
        for example, logps in zip(getattr(data, part), reference[part], strict=True):
            for (ids, labels), logp in zip(list_tokens_and_labels_by_row(example), logps, strict=True):
                with torch.no_grad():
                    log_probs = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                learned = [t for t in range(1, len(ids)) if labels[t] != -100]
                assert sum(log_probs[t - 1, ids[t]].item() for t in learned) == pytest.approx(logp, abs=1e-4)
