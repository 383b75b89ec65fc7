"""Training on documents, and measuring other documents."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from row_files import write_jsonl
from tiny_run import distance, recipe_of, train_in_two_parts

from slimtune.core.training.train import train
from slimtune.core.training.trained_model import load_run
from slimtune.evaluation.evaluate import EvalSettings, evaluate


@pytest.fixture
def documents(settings, tmp_path):
    """Settings of a run on 10 documents of 6 to 330 tokens, cut into windows of at most 32."""
    (tmp_path / "book").mkdir()
    for i in range(10):
        (tmp_path / "book" / f"{i}.md").write_text("abc " * (1 + i * i))
    settings["data"] |= {"train": str(tmp_path / "book"), "validation": None, "validation_fraction": 0.2}
    settings["data"] |= {"format": "document", "max_seq_len": 32}
    settings["train"] |= {"batch_size": 20}
    return settings


def test_resumed_run_is_bit_for_bit_the_whole_one(documents, tmp_path, monkeypatch):
    result = train(recipe_of({**documents, "output_dir": str(tmp_path / "whole")}))
    log = (tmp_path / "whole" / "train.log").read_text()
    assert re.search(r"\b2 .*validation", log)
    assert re.search(rf"\b8 documents .*\b{result.rows} windows .*\b32 tokens", log)
    assert result.steps == 2 * math.ceil(result.rows / 20) == 4
    train_in_two_parts(recipe_of(documents), monkeypatch, 2)
    assert distance(documents["output_dir"], tmp_path / "whole") == 0


@torch.no_grad()
def sum_nats(model, ids, size):
    """The loss of a document whose windows the model's own code computes one by one."""
    nats = 0.0
    for start in range(0, len(ids) - 1, size - 1):  # the last token of a window is the context of the next one
        row = torch.tensor([ids[start : start + size]])
        log_p = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
        nats -= log_p.gather(1, row[0, 1:, None]).sum().item()
    return nats


def test_perplexity_is_over_whole_documents(documents, tmp_path):
    run = Path(train(recipe_of(documents, max_steps=2)).run)
    texts = ["cab " * n for n in (1, 3, 20, 30, 5, 6)]
    found = evaluate(run, EvalSettings(data=write_jsonl(tmp_path / "other.jsonl", ({"text": t} for t in texts))))
    trained = load_run(run)
    tokenizer = trained.base.tokenizer
    rows = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    nats, tokens = [sum_nats(trained.model, ids, 32) for ids in rows], sum(len(ids) - 1 for ids in rows)
    assert (found.measures.rows, found.measures.tokens, found.measures.prompt_dependence) == (6, tokens, None)
    perplexity = found.measures.tuned_perplexity
    assert perplexity.value == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-6)
    assert perplexity.low < perplexity.value < perplexity.high
    lines = json.loads((run / "scores-data-other.json").read_text())
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tuned"] for line in lines] == pytest.approx(nats, rel=1e-6)


def test_windows_of_few_documents_are_the_rows(documents, tmp_path):
    run = Path(train(recipe_of(documents, max_steps=2)).run)
    text = " ".join("cab" if i * i % 7 < 3 else "abc" for i in range(250))
    found = evaluate(run, EvalSettings(data=write_jsonl(tmp_path / "one.jsonl", [{"text": text}]))).measures
    assert (found.rows > 6, found.windowed_documents) == (True, 1)
    assert found.loss_reduction.low < found.loss_reduction.value < found.loss_reduction.high
    lines = json.loads((run / "scores-data-one.json").read_text())
    assert {line["line"] for line in lines} == {1}
    assert sum(line["tokens"] for line in lines) == found.tokens


def test_a_document_of_few_windows_is_cut_into_shorter_ones(documents, tmp_path):
    documents["data"]["max_seq_len"] = 512
    run = Path(train(recipe_of(documents, max_steps=2)).run)
    text = " ".join("cab" if i * i % 7 < 3 else "abc" for i in range(700))
    found = evaluate(run, EvalSettings(data=write_jsonl(tmp_path / "one.jsonl", [{"text": text}]))).measures
    assert found.rows >= 20
    assert found.windowed_documents == 1
