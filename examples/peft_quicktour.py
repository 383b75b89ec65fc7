"""PEFT's quick tour, offline: wrap a model, train it, save the adapter, load it again, generate.

    python examples/peft_quicktour.py MODEL_FOLDER OUTPUT_FOLDER

Written for `peft`; the import is all that changed.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from slimtune import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model

base, output = sys.argv[1:3]
lines = ["ABSURDITY, n. A statement of belief inconsistent with one's own opinion.", "ALONE, adj. In bad company."] * 8

tokenizer = AutoTokenizer.from_pretrained(base)
rows = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
dataset = [{"input_ids": row, "labels": row} for row in rows]

torch.manual_seed(0)
peft_config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft_config)
model.print_trainable_parameters()

training_args = TrainingArguments(
    output_dir=f"{output}/run",
    learning_rate=1e-3,
    per_device_train_batch_size=1,
    max_steps=8,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(model=model, args=training_args, train_dataset=dataset)
trainer.train()
print(f"loss {trainer.state.log_history[-2]['loss']:.6f}")

model.save_pretrained(f"{output}/adapter")

model = AutoPeftModelForCausalLM.from_pretrained(f"{output}/adapter")
model.eval()
inputs = tokenizer("ALONE, adj.", return_tensors="pt")
with torch.no_grad():
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    outputs = model.generate(input_ids=inputs["input_ids"], max_new_tokens=8, do_sample=False)
print(f"reloaded {loss:.6f}")
print(tokenizer.batch_decode(outputs, skip_special_tokens=True)[0])
