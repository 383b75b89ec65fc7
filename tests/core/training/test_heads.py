"""Runs of `task: classification` and `task: reward`: training, HF PEFT's loading, evaluation, and refused rows."""

import peft
import pytest
import torch
import transformers as tf
from row_files import write_jsonl
from run_answers import RunAnswers

from slimtune.core.config import Recipe
from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.errors import DataError, RecipeError, UsageError
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.export.exporter import export
from slimtune.export.merge import merge
from slimtune.export.verify import verify

WORDS = {"sea": "wave salt sail", "wood": "oak fern moss", "city": "tram bank roof"}
ROWS = [{"text": f"{WORDS[c]} {i}", "label": c} for i in range(8) for c in WORDS]
TOPICS = [{"text": f"{WORDS[c]} {i}", "label": [c, "wet"] if c == "sea" else []} for i in range(8) for c in WORDS]


def make_recipe(folder, base, rows=ROWS, task="classification", steps=2, **data):
    return Recipe.from_dict({
        "model": {"name": str(base), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "test_fraction": 0.25,
                 "validation_fraction": 0.125, **data},
        "task": task, "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": steps, "learning_rate": 1e-2}, "output_dir": str(folder / "run"),
    })  # fmt: skip


def logits_of(model, tokenizer, text="wave salt sail 3"):
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits


@pytest.mark.parametrize("rows", [ROWS, TOPICS])
def test_run_loads_in_peft_with_equal_logits_and_is_evaluated(tmp_path, tiny_folder, rows):
    train(make_recipe(tmp_path, tiny_folder, rows))
    adapter = tmp_path / "run" / "adapter"
    config = tf.AutoConfig.from_pretrained(adapter)
    base = tf.AutoModelForSequenceClassification.from_pretrained(tiny_folder, config=config)
    theirs = peft.PeftModel.from_pretrained(base, adapter)
    ours, tokenizer = load_run(tmp_path / "run"), tf.AutoTokenizer.from_pretrained(adapter)
    assert (logits_of(ours.model, tokenizer) - logits_of(theirs, tokenizer)).abs().max() < 1e-6
    assert theirs.config.id2label == dict(enumerate(["city", "sea", "wood"] if rows is ROWS else ["sea", "wet"]))
    result = evaluate(tmp_path / "run", EvalSettings(bootstrap=50))
    assert result.measures.rows == 6
    f1 = result.measures.macro_f1
    assert 0 <= f1.low <= f1.value <= f1.high <= 1
    assert (result.measures.confusion is None) == (rows is TOPICS)
    assert "macro-F1" in (tmp_path / "run" / "report.html").read_text()


def test_adapter_of_peft_is_read(tmp_path, tiny_folder):
    base = tf.AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=3, pad_token_id=2)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = (
        load_run(tmp_path / "theirs", dtype="float32", device="cpu"),
        tf.AutoTokenizer.from_pretrained(tiny_folder),
    )
    assert (logits_of(ours.model, tokenizer) - logits_of(theirs, tokenizer)).abs().max() < 1e-6
    assert ours.classes.names == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_class_that_only_held_out_rows_have_is_refused_with_its_line(tmp_path, tiny_folder, split):
    other = write_jsonl(tmp_path / "other.jsonl", [ROWS[0], {"text": "dune", "label": "desert"}])
    with pytest.raises(DataError, match=r"'desert'.*line 2") as error:
        train(make_recipe(tmp_path, tiny_folder, **{"test_fraction": 0.0, split: str(other)}))
    assert not (tmp_path / "run").exists(), error


@pytest.mark.parametrize("labels", [["sea", "wood"], []])
def test_held_out_row_without_one_label_is_refused_before_training(tmp_path, tiny_folder, labels):
    test = write_jsonl(tmp_path / "other.jsonl", [ROWS[0], {"text": "dune", "label": labels}])
    with pytest.raises(DataError, match="line 2"):
        train(make_recipe(tmp_path, tiny_folder, test_fraction=0.0, test=str(test)))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_all_zero_are_refused(tmp_path, tiny_folder):
    task = {"name": "classification", "class_weights": dict.fromkeys([row["label"] for row in ROWS], 0.0)}
    with pytest.raises(DataError, match=r"task\.class_weights"):
        train(make_recipe(tmp_path, tiny_folder, task=task))


def test_rows_of_one_class_and_weights_of_no_class_are_refused(tmp_path, tiny_folder):
    with pytest.raises(DataError, match="'sea'"):
        train(make_recipe(tmp_path, tiny_folder, ROWS[::3]))
    with pytest.raises(DataError, match=r"'see'.*'sea'"):
        train(make_recipe(tmp_path, tiny_folder, task={"name": "classification", "class_weights": {"see": 2.0}}))
    with pytest.raises(RecipeError, match="class_weights"):
        make_recipe(tmp_path, tiny_folder, task={"name": "classification", "class_weights": "balance"})


def test_classifier_is_merged_and_writes_no_answers(tmp_path, tiny_folder):
    train(make_recipe(tmp_path, tiny_folder))
    run = tmp_path / "run"
    for refused in (
        lambda: evaluate(run, EvalSettings(generate=1)),
        lambda: RunAnswers.open(run),
        lambda: export(run, "gguf", tmp_path / "gguf"),
        lambda: verify(run),
    ):
        with pytest.raises(UsageError, match="classifier"):
            refused()
    merge(run, tmp_path / "merged")
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (logits_of(merged, tokenizer) - logits_of(load_run(run).model, tokenizer)).abs().max() < 1e-5
    assert merged.config.id2label == {0: "city", 1: "sea", 2: "wood"}


SAID = {"role": "assistant"}
PAIRS = [
    {"prompt": [{"role": "user", "content": f"How is day {i}?"}], "chosen": [{**SAID, "content": f"sunny {i}"}],
     "rejected": [{**SAID, "content": f"rainy {i}"}]}
    for i in range(24)
]  # fmt: skip


def test_reward_model_loads_in_peft_and_is_evaluated(tmp_path, tiny_folder):
    train(make_recipe(tmp_path, tiny_folder, PAIRS, "reward", 6, test_fraction=0.5, validation_fraction=0.1))
    result = evaluate(tmp_path / "run", EvalSettings(bootstrap=50))
    assert result.measures.accuracy.value == 1.0
    assert 0 < result.measures.margin.low <= result.measures.margin.value
    assert result.verdict.passed
    assert "Margin" in (tmp_path / "run" / "report.html").read_text()

    adapter = tmp_path / "run" / "adapter"
    config, tokenizer = tf.AutoConfig.from_pretrained(adapter), tf.AutoTokenizer.from_pretrained(adapter)
    base = tf.AutoModelForSequenceClassification.from_pretrained(tiny_folder, config=config)
    theirs, ours = peft.PeftModel.from_pretrained(base, adapter).eval(), load_run(tmp_path / "run").model
    ids = tokenizer.apply_chat_template([*PAIRS[0]["prompt"], *PAIRS[0]["chosen"]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-6
    assert theirs.config.num_labels == 1
    merge(tmp_path / "run", tmp_path / "merged")
    merged = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (merged(ids).logits - ours(ids).logits).abs().max() < 1e-5
