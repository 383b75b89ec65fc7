"""TRL's ways of `benchmarks/step.py`: `python trl_ways.py SPEC.json WAY`. Without slimtune.

    trl             SFTTrainer with packing (its best-fit-decreasing strategy, padding-free), 16-bit weights
    trl-packs       the same, a step's rows in several packs, accumulated: `--packs` of them
    …-bf16          the same with 16-bit adapters (a PeftModel made with `autocast_adapter_dtype=False`)
    trl-autocast    the same as `trl` under SFTConfig's default, bf16=True: autocast

Packing needs no flash attention: under sdpa the rows of a pack are kept apart by `position_ids`. What differs from
SFTConfig's defaults speaks for TRL or for nobody: no gradient checkpointing, no shuffling, and each step's rows are
packed by themselves (`trl.pack_dataset`) so that a step has the rows it has everywhere. The labels are the rows' own:
the loss counts the tokens that completion-only loss would.
"""

import tempfile
from typing import Any

import peft
import torch
from datasets import Dataset, concatenate_datasets
from peft_ways import adapter_dtype
from trainer_turns import PLAIN, InTurns, watched
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset
from worker import Row, Turns, parted


def packs(steps: list[list[Row]], count: int) -> Dataset:
    """So many packs for each step, as TRL packs rows."""
    found = []
    for part in [part for rows in steps for part in parted(rows, count)]:
        room = sum(len(row["input_ids"]) for row in part)
        found.append(pack_dataset(Dataset.from_list(part), room, "bfd"))
        assert len(found[-1]) == 1
    return concatenate_datasets(found)


def main() -> None:
    turns = Turns()
    spec = turns.spec
    _, *rest = turns.way.split("-")
    model: Any = AutoModelForCausalLM.from_pretrained(
        spec["base"], dtype=getattr(torch, spec["dtype"]), attn_implementation="sdpa"
    )
    config = peft.LoraConfig(**spec["lora"])
    if "bf16" in rest:
        model, config = peft.get_peft_model(model, config, autocast_adapter_dtype=False), None
    steps = [step for steps in turns.rounds for step in steps]
    count = min(spec["packs"], len(steps[0])) if "packs" in rest else 1
    data = packs(steps, count)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            learning_rate=spec["learning_rate"],
            packing=True,
            max_length=max(map(len, data["input_ids"])),
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=1,
            gradient_accumulation_steps=count,
            max_steps=len(steps),
            bf16="autocast" in rest,
            gradient_checkpointing=False,
            seed=spec["seed"],
            **PLAIN,
        )
        trainer = watched(SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(spec["base"]),
            peft_config=config,
        )
        trainer.watch = InTurns(turns, adapters=adapter_dtype(trainer.model))
        trainer.add_callback(trainer.watch)
        trainer.train()


if __name__ == "__main__":
    main()
