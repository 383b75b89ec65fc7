"""Tasks of lm-evaluation-harness: the user's own task on local data, for base and tuned model; and errors."""

import importlib.util
import json

import pytest
import torch
from hand_run import TALKS, make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimtune.core.adapters.peft_model import PeftModel
from slimtune.errors import ModelError, UsageError
from slimtune.evaluation.eval_result import read_eval_result
from slimtune.evaluation.evaluate import EvalSettings, evaluate

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the package lm-eval is not installed (make tasks)"
)
TASK = """
task: which_one
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""


@pytest.fixture
def folder(tmp_path):
    """A task: of two answers, which belongs to the question."""
    made = tmp_path / "tasks"
    made.mkdir()
    rows = [{"question": q, "choices": [a, TALKS[i - 1][1]], "answer": 0} for i, (q, a) in enumerate(TALKS)]
    (made / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (made / "which_one.yaml").write_text(TASK.format(file=made / "rows.jsonl"))
    return made


@torch.no_grad()
def measure_accuracy(model, tokenizer):
    right = 0
    for i, (question, answer) in enumerate(TALKS):
        ask = [{"role": "user", "content": question}]
        start = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        likelihoods = []
        for choice in (answer, TALKS[i - 1][1]):
            ids = torch.tensor([tokenizer(start + choice, add_special_tokens=False)["input_ids"]])
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(log_p[-len(choice.encode()) :].sum().item())
        right += likelihoods[0] > likelihoods[1]
    return right / len(TALKS)


@needs_harness
def test_scores_of_base_and_tuned_model(tmp_path, tiny_folder, folder):
    run = make_run(tmp_path / "run", tiny_folder, size=0.4)
    found = evaluate(run, EvalSettings(tasks=["which_one"], tasks_path=folder)).tasks["which_one"]["acc"]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert found.base == pytest.approx(measure_accuracy(model, tokenizer))
    tuned = PeftModel.from_pretrained(model, run / "adapter")
    assert found.tuned == pytest.approx(measure_accuracy(tuned, tokenizer))
    assert found.base_stderr > 0
    assert found.higher_is_better is True
    kept = read_eval_result(json.loads((run / "eval-test.json").read_text()))
    assert kept.tasks["which_one"]["acc"] == found


@needs_harness
def test_unknown_and_failing_tasks(run, folder):
    with pytest.raises(UsageError, match=r"'which_on'.*'which_one'"):
        evaluate(run, EvalSettings(tasks=["which_on"], tasks_path=folder))
    with pytest.raises(UsageError, match="--tasks-path"):
        evaluate(run, EvalSettings(tasks=["which_one"], tasks_path=folder / "none"))
    assert not (run / "eval-test.json").exists()
    (folder / "rows.jsonl").unlink()
    with pytest.raises(ModelError, match=r"lm-eval .*which_one"):
        evaluate(run, EvalSettings(tasks=["which_one"], tasks_path=folder))
    assert json.loads((run / "eval-test.json").read_text())["tasks"] is None  # what was measured before stays


def test_missing_package(run, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    with pytest.raises(ModelError, match="lm-eval"):
        evaluate(run, EvalSettings(tasks=["which_one"]))
