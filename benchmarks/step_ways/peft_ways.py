"""HF PEFT's ways of `benchmarks/step.py`: `python peft_ways.py SPEC.json WAY`. Without slimtune.

    peft-tour           as its quick tour sets it up: transformers' Trainer, fp32 weights, lora_dropout 0.1, padded
    peft-tour-auto      the same with the weights in the checkpoint's dtype, which is what transformers 5 loads
    peft-padded[-bf16]  16-bit weights, no dropout, a plain loop; 8 rows padded to the longest
    peft-sorted[-bf16]  the same, the step's rows sorted by length and run in several passes: little is padded
    peft-packed[-bf16]  the same, the step's rows in one sequence, kept apart by `position_ids` (block-diagonal mask)
    peft-packs[-bf16]   the same in several sequences of like length: the mask is smaller, and so is every pass

How many is `--packs`, by default what was fastest for a kind of rows. Adapters are fp32, PEFT's default above 16-bit
weights; `-bf16`: `autocast_adapter_dtype=False`.
"""

import math
import tempfile
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from worker import Row, Turns, parted, serve

IGNORED = -100


def adapted(turns: Turns, dtype: str | torch.dtype, autocast: bool, dropout: float = 0.0) -> Any:
    model = AutoModelForCausalLM.from_pretrained(turns.spec["base"], dtype=dtype, attn_implementation="sdpa")
    config = peft.LoraConfig(**turns.spec["lora"], lora_dropout=dropout)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)


def padded(rows: list[Row], pad: int) -> tuple[dict[str, Tensor], int]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}, ids.numel()


def packed(rows: list[Row]) -> tuple[dict[str, Tensor], int]:
    ids = [token for row in rows for token in row["input_ids"]]
    # A row's first token would be the target of the row before it.
    labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
    positions = [i for row in rows for i in range(len(row["input_ids"]))]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in batch.items()}, len(ids)


def own_loss(model: Any, batch: dict[str, Tensor], supervised: int) -> Tensor:
    """The model's own loss; with a cache, rows of one sequence would see each other."""
    share = int((batch["labels"][:, 1:] != IGNORED).sum()) / supervised
    return model(**batch, use_cache=False).loss * share


def by_loop(turns: Turns, laid: str, autocast: bool) -> None:
    pad = turns.spec["pad_token_id"]

    def passes(rows: list[Row]) -> list[tuple[dict[str, Tensor], int]]:
        if laid in ("packed", "packs"):
            return [packed(part) for part in parted(rows, 1 if laid == "packed" else turns.spec["packs"])]
        some = sorted(rows, key=lambda row: len(row["input_ids"]))
        each = len(some) if laid == "padded" else math.ceil(len(some) / turns.spec["packs"])
        return [padded(some[at : at + each], pad) for at in range(0, len(some), each)]

    model = adapted(turns, getattr(torch, turns.spec["dtype"]), autocast)
    serve(turns, model, passes, own_loss, adapters=adapter_dtype(model))


def by_trainer(turns: Turns, dtype: str | torch.dtype) -> None:
    from trainer_turns import PLAIN, InTurns, watched

    model = adapted(turns, dtype, True, dropout=0.1)
    steps = [step for steps in turns.rounds for step in steps]
    watch = InTurns(turns, adapters=adapter_dtype(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=turns.spec["learning_rate"],
            per_device_train_batch_size=len(steps[0]),
            weight_decay=0.01,
            max_steps=len(steps),
            seed=turns.spec["seed"],
            **PLAIN,
        )
        trainer = watched(Trainer)(
            model=model,
            args=arguments,
            train_dataset=[row for step in steps for row in step],
            data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(turns.spec["base"])),
            callbacks=[watch],
        )
        trainer.watch = watch
        trainer.train()


def adapter_dtype(model: Any) -> str:
    return str(next(p.dtype for p in model.parameters() if p.requires_grad)).removeprefix("torch.")


def main() -> None:
    turns = Turns()
    _, laid, *rest = turns.way.split("-")
    if laid == "tour":
        by_trainer(turns, "auto" if rest else torch.float32)
    else:
        by_loop(turns, laid, autocast=not rest)


if __name__ == "__main__":
    main()
