"""Tiny runs that really learned, on a base that really knows a text: what belongs to a prompt, or style alone."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hand_run import make_run, write_rows
from transformers import AutoTokenizer

from slimtune.attention.register import packed_attention
from slimtune.data.dataset import read_rows
from slimtune.data.tokenize import tokenize_dataset
from slimtune.train_step.loss import make_collator, step_loss

WORDS = {
    "ash": "grey dust",
    "bee": "it hums",
    "cod": "a cold fish",
    "dew": "wet grass",
    "elm": "tall shade",
    "fig": "sweet",
}


def talks(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions about six words and their answers."""
    draw = random.Random(seed)
    return [(word, WORDS[word]) for word in draw.choices(sorted(WORDS), k=rows)]


def shuffled(pairs: list[tuple[str, str]], seed: int = 1) -> list[tuple[str, str]]:
    """The same questions and the same answers, given to each other by chance."""
    answers = [a for _, a in pairs]
    random.Random(seed).shuffle(answers)
    return [(q, a) for (q, _), a in zip(pairs, answers, strict=True)]


KNOWN = "The sea was calm and the boat lay still. " * 40


def knowing_base(folder: Path, model: Any, tokenizer: Any, steps: int = 60) -> Path:
    """Write a base whose every weight was trained on `KNOWN`."""
    ids = torch.tensor(tokenizer(KNOWN)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    for _ in range(steps):
        at = [draw.randrange(len(ids) - 64) for _ in range(4)]
        some = torch.stack([ids[a : a + 64] for a in at])
        model.train()(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_run(path: Path, base: Path, pairs: list[tuple[str, str]], *, steps: int = 150, rate: float = 1e-2) -> Path:
    """Write a run folder whose adapter was trained on pairs; its test rows are 40 others."""
    run = make_run(path, base, size=0.05, method={"rank": 16}, change=_training(path, base, pairs, steps, rate))
    write_rows(path.with_name(f"{path.name}-rows.jsonl"), talks(40, seed=9))
    return run


def _training(path: Path, base: Path, pairs: list, steps: int, rate: float) -> Callable[[Any], None]:
    def train(model: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        file = write_rows(path.with_name(f"{path.name}-train.jsonl"), pairs)
        examples, _ = tokenize_dataset(read_rows(file), tokenizer, max_seq_len=512, path=file)
        collator = make_collator(model, tokenizer.pad_token_id)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        draw = random.Random(0)
        for _ in range(steps):
            with packed_attention(model):
                step_loss(model.train(), collator(draw.sample(examples, 8))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return train
