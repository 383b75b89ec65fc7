"""Predictions for new texts, against transformers."""

import json

import jsonschema
import peft
import pytest
import torch
import transformers as tf
from row_files import write_jsonl
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.cli.json_types import make_command_output_schema
from slimtune.core.foundation.json_results import to_json_dict
from slimtune.errors import DataError, UsageError
from slimtune.evaluation.predict import _read_inputs, predict_file, predict_records

TEXTS = ["wave salt sail", "tram", "oak fern moss and more", "a"]
KINDS = {"classes": {"problem_type": "single_label_classification"},
         "labels": {"problem_type": "multi_label_classification"}, "reward": {}}  # fmt: skip


@pytest.fixture
def adapter(request, tmp_path, tiny_folder):
    """The adapter folder of a classifier that HF PEFT saved, and its logits of `TEXTS`."""
    names = ["city", "sea", "wood"] if request.param != "reward" else ["reward"]
    ids = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    config = tf.AutoConfig.from_pretrained(tiny_folder, pad_token_id=0, **ids, **KINDS[request.param])
    torch.manual_seed(0)
    base = tf.AutoModelForSequenceClassification.from_pretrained(tiny_folder, config=config, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "adapter")
    config.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    return tmp_path / "adapter", logits.double()


def predict(folder, tmp_path, rows):
    data = write_jsonl(tmp_path / "new.jsonl", rows)
    result = predict_file(folder, data, tmp_path / "out.jsonl", device="cpu")
    return result, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", KINDS, indirect=True)
def test_predictions_are_those_of_transformers(adapter, tmp_path, request):
    folder, logits = adapter
    names, kind = ["city", "sea", "wood"], request.node.callspec.params["adapter"]
    result, rows = predict(folder, tmp_path, [{"id": i, "text": t, "label": "?"} for i, t in enumerate(TEXTS)])
    assert [(r["id"], r["text"]) for r in rows] == list(enumerate(TEXTS))
    jsonschema.validate(to_json_dict(result), make_command_output_schema("predict"))
    if kind == "reward":
        assert [r["reward"] for r in rows] == pytest.approx(logits[:, 0].tolist(), abs=0.05)
        assert result.mean_reward == pytest.approx(sum(r["reward"] for r in rows) / len(rows))
        return
    expected = logits.softmax(1) if kind == "classes" else logits.sigmoid()
    found = torch.tensor([[r["probabilities"][n] for n in names] for r in rows], dtype=torch.float64)
    assert (found - expected).abs().max() < 0.02  # the machine's dtype may be bf16
    chosen = [names[i] for i in found.argmax(1)] if kind == "classes" else [
        [n for n, p in zip(names, row, strict=True) if p > 0.5] for row in found]  # fmt: skip
    assert [r["predicted"] for r in rows] == chosen
    assert sum(result.classes.values()) == sum(len(c) if kind == "labels" else 1 for c in chosen)


@pytest.mark.parametrize("adapter", ["classes"], indirect=True)
def test_columns_of_a_recipe_count_where_a_row_has_them_and_given_ones_everywhere(adapter, tmp_path):
    data = write_jsonl(tmp_path / "new.jsonl", [{"mail": "tram"}, {"text": "oak"}])
    assert [row.prompt for row, _ in _read_inputs(data, {"text": "mail", "label": "kind"}, is_given=False)] == [
        "tram", "oak",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"new\.jsonl:2: .*'mail'"):
        predict_records(adapter[0], data, columns={"text": "mail"}, device="cpu")


def test_a_hint_guesses_the_column_of_the_text(tmp_path):
    data = write_jsonl(tmp_path / "new.jsonl", [{"mail body": f"text {i}", "nr": i} for i in range(3)])
    with pytest.raises(DataError) as caught:
        _read_inputs(data, {}, is_given=False)
    assert caught.value.hint == "--column 'text=mail body'"


@pytest.mark.parametrize("adapter", ["classes"], indirect=True)
def test_predictions_are_printed_without_out_and_several_texts_are_taken(adapter, tmp_path):
    data = write_jsonl(tmp_path / "new.jsonl", [{"mail": "tram"}, {"mail": "oak"}])
    run = CliRunner().invoke(app, ["predict", str(adapter[0]), "--data", str(data), "--column", "text=mail"])
    assert [json.loads(line).keys() for line in run.stdout.splitlines()] == [
        {"mail", "predicted", "probabilities"}
    ] * 2  # fmt: skip
    run = CliRunner().invoke(app, ["predict", str(adapter[0]), "tram", "oak", "--json"])
    jsonschema.validate(json.loads(run.stdout), make_command_output_schema("predict"))
    assert [t["text"] for t in json.loads(run.stdout)["texts"]] == ["tram", "oak"]


@pytest.mark.parametrize("adapter", ["classes"], indirect=True)
def test_rows_without_text_are_named_and_nothing_is_written(adapter, tmp_path):
    with pytest.raises(DataError, match=r"new\.jsonl:2: .*'text'.*'messages'"):
        predict(adapter[0], tmp_path, [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r":1: .*\b601 .*\b512\b"):
        predict(adapter[0], tmp_path, [{"text": "x" * 601}])
    with pytest.raises(DataError, match=r"new\.jsonl"):
        predict(adapter[0], tmp_path, [])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("adapter", ["classes"], indirect=True)
def test_command_predicts_one_text(adapter):
    shown = CliRunner().invoke(app, ["predict", str(adapter[0]), "wave salt sail", "--json"])
    assert shown.exit_code == 0, shown.stderr
    printed = json.loads(shown.stdout)
    assert printed["predicted"] in ("city", "sea", "wood")
    jsonschema.validate(printed, make_command_output_schema("predict"))
    wrong = CliRunner().invoke(app, ["predict", str(adapter[0]), "a", "--data", "b.jsonl"])
    assert (wrong.exit_code, "--data" in wrong.stderr) == (2, True)


def test_language_model_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match="adapter"):
        predict(run, tmp_path, [{"text": "a"}])
