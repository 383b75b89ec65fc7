"""Runs of `task: reward`: training, HF PEFT's loading, and evaluation."""

import peft
import torch
import transformers as tf
from row_files import write_jsonl

from slimtune.config import Recipe
from slimtune.evaluation.evaluate import EvalSettings, evaluate
from slimtune.export.merge import merge
from slimtune.setup import load_run
from slimtune.training.train import train

SAID = {"role": "assistant"}
PAIRS = [
    {"prompt": [{"role": "user", "content": f"How is day {i}?"}], "chosen": [{**SAID, "content": f"sunny {i}"}],
     "rejected": [{**SAID, "content": f"rainy {i}"}]}
    for i in range(24)
]  # fmt: skip


def test_reward_model_loads_in_peft_and_is_evaluated(tmp_path, tiny_folder):
    train(Recipe.from_dict({
        "model": {"name": str(tiny_folder), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", PAIRS)), "test_fraction": 0.5,
                 "validation_fraction": 0.1},
        "task": "reward", "method": {"name": "lora", "rank": 2},
        "train": {"max_steps": 6, "learning_rate": 1e-2}, "output_dir": str(tmp_path / "run"),
    }))  # fmt: skip
    result = evaluate(tmp_path / "run", EvalSettings(bootstrap=50))
    assert result["accuracy"] == 1.0
    assert 0 < result["margin_ci95"][0] <= result["margin"]
    assert result["verdict"]["passed"]
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
