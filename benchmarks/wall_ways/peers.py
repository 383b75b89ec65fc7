"""One training by a peer's script: `python peers.py WAY BASE ROWS.jsonl OUT`; see `benchmarks/wall.py`. No slimtune."""

import json
import sys
import time
from typing import Any

import peft
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 42,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def encoded(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels where the assistant speaks last."""
    whole = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)
    start = len(asked["input_ids"])
    return {"input_ids": whole, "labels": [-100] * start + whole[start:]}


def main() -> None:
    _, way, base, path, out = sys.argv
    began = time.perf_counter()
    dtype = torch.float32 if way == "peft-tour" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    load, began = time.perf_counter() - began, time.perf_counter()
    config = peft.LoraConfig(**LORA, lora_dropout=0.1 if way == "peft-tour" else 0.0)
    rows = load_dataset("json", data_files=path, split="train")
    if way == "trl":
        # Prompt and completion, so that only the answer is learned.
        rows = rows.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
        )
        # A pack of about 8 rows is a step, so that a step has what it has elsewhere.
        arguments = SFTConfig(
            out, **{**SHARED, "per_device_train_batch_size": 1}, packing=True, max_length=664, bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer: Any = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    else:
        rows = rows.map(lambda row: encoded(tokenizer, row), remove_columns="messages")
        if way == "peft-tour":
            collator: Any = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        else:  # rows in one sequence, kept apart by position_ids, which needs the cache off
            collator = DataCollatorWithFlattening(return_position_ids=True)
            model.config.use_cache = False
        model = peft.get_peft_model(model, config)
        trainer = Trainer(model, TrainingArguments(out, **SHARED), train_dataset=rows, data_collator=collator)
    prepare = time.perf_counter() - began
    trainer.train()
    trainer.model.save_pretrained(out)
    print(json.dumps({"seconds": time.perf_counter() - began, "prepare": prepare, "load": load}))


if __name__ == "__main__":
    main()
