"""The base and the rows, the same in every process: drawn from seeds, so that nothing is downloaded or passed around.

python -m gpu_ways.setting SPEC FOLDER      writes the base and a tokenizer, for a library that loads folders only
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "135m": {  # SmolLM2-135M
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
WEIGHTS = {"tiny": 1 << 20, "135m": 280 << 20, "1b": 2400 << 20, "8b": 15400 << 20}
"""Bytes of each in bf16."""

PREFIX = 64
KINDS = ("no prefix", f"prefix {PREFIX}", "dictionary")
DICTIONARY = Path(__file__).parents[2] / "examples/devils-dictionary/train.jsonl"
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(spec: dict[str, Any], attention: str = "sdpa") -> Any:
    """The frozen base in bf16, on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    how: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": attention}
    if spec["model"]:
        return AutoModelForCausalLM.from_pretrained(spec["model"], local_files_only=True, **how).to(spec["device"])
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[spec["size"]], max_position_embeddings=8192, pad_token_id=0)
    with torch.device(spec["device"]):
        return AutoModelForCausalLM.from_config(config, **how)


def rows_of(spec: dict[str, Any], kind: str, turn: int, step: int, vocabulary: int) -> list[Row]:
    """The rows of one step: `{input_ids, labels}`, -100 where nothing is learned."""
    draw = random.Random(f"{kind} {turn} {step}")
    if kind == "dictionary":
        lines = DICTIONARY.read_text(encoding="utf-8").splitlines()
        return [_bytes(json.loads(line)["messages"]) for line in draw.sample(lines, spec["rows"])]
    shared = random.Random(kind)
    first = [shared.randrange(3, vocabulary) for _ in range(PREFIX)] if kind.startswith("prefix") else []
    rows = []
    for _ in range(spec["rows"]):
        own = [draw.randrange(3, vocabulary) for _ in range(min(512, 32 + int(draw.expovariate(1 / 100))))]
        asked = len(first) + len(own) // 4
        rows.append({"input_ids": first + own, "labels": [-100] * asked + own[len(own) // 4 :]})
    return rows


def _bytes(messages: list[dict[str, str]]) -> Row:
    """A conversation as its bytes: a tokenizer would have to be downloaded."""
    *before, last = (list(f"{m['role']}\n{m['content']}\n".encode()) for m in messages)
    asked = [3 + b for part in before for b in part]
    answer = [3 + b for b in last]
    return {"input_ids": asked + answer, "labels": [-100] * len(asked) + answer}


def learned(row: Row) -> int:
    """How many of a row's tokens are predicted and learned: its first is never predicted."""
    return sum(label != -100 for label in row["labels"][1:])


def packed(rows: list[Row]) -> dict[str, Any]:
    """Rows one after another in one sequence, as transformers keeps them apart: by positions that begin anew."""
    import torch

    flat = {
        "input_ids": [t for r in rows for t in r["input_ids"]],
        "position_ids": [p for r in rows for p in range(len(r["input_ids"]))],
        "labels": [label for r in rows for label in [-100, *r["labels"][1:]]],
    }
    return {k: torch.tensor([v]) for k, v in flat.items()}


def padded(rows: list[Row]) -> dict[str, Any]:
    """One row each, filled on the right."""
    import torch

    width = max(len(r["input_ids"]) for r in rows)

    def fill(values: list[int], with_: int) -> list[int]:
        return values + [with_] * (width - len(values))

    return {
        "input_ids": torch.tensor([fill(r["input_ids"], 0) for r in rows]),
        "attention_mask": torch.tensor([fill([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([fill(r["labels"], -100) for r in rows]),
    }


def _write(spec: dict[str, Any], folder: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base(spec).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    _write(json.loads(sys.argv[1]), sys.argv[2])
