"""TRL's SFT quick start with an adapter, offline.

    python examples/trl_sft_quickstart.py MODEL_FOLDER OUTPUT_FOLDER

Written for `peft`; the import is all that changed.
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from slimtune import LoraConfig, PeftModel

base, output = sys.argv[1:3]
pairs = [("Alone?", "In bad company."), ("A bore?", "A person who talks when you wish him to listen.")] * 8
rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]

trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    args=SFTConfig(
        output_dir=output,
        learning_rate=1e-3,
        max_steps=6,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_length=64,
        save_strategy="steps",
        save_steps=3,
        bf16=False,
        report_to=[],
    ),
    train_dataset=Dataset.from_dict({"messages": rows}),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(f"{output}/adapter")
print(f"loss {[entry['loss'] for entry in trainer.state.log_history if 'loss' in entry][-1]:.6f}")

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{output}/adapter")
print(f"adapters {sorted(model.peft_config)}, trained as a PeftModel: {isinstance(trainer.model, PeftModel)}")
