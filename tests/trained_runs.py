"""Tiny runs that really learned, on a base that really knows a text."""

import random

import torch
from hand_run import make_run, write_rows
from transformers import AutoTokenizer

from slimtune.core.attention.attention_functions import using_packed_attention
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.core.training.loss import compute_step_loss, make_collator
from slimtune.extras.row_files import read_rows

WORDS = {"ash": "grey dust", "bee": "it hums", "cod": "a cold fish", "dew": "wet grass", "elm": "tall shade",
         "fig": "sweet"}  # fmt: skip
KNOWN = "The sea was calm and the boat lay still. " * 40


def make_talks(rows, seed=0):
    """Questions about six words and their answers."""
    return [(word, WORDS[word]) for word in random.Random(seed).choices(sorted(WORDS), k=rows)]


def shuffle_answers(talks):
    answers = [answer for _, answer in talks]
    random.Random(1).shuffle(answers)
    return [(question, answer) for (question, _), answer in zip(talks, answers, strict=True)]


def train_base(folder, model, tokenizer):
    """Write a base whose every weight was trained on `KNOWN`."""
    ids = torch.tensor(tokenizer(KNOWN)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    for _ in range(60):
        rows = torch.stack([ids[at : at + 64] for at in (draw.randrange(len(ids) - 64) for _ in range(4))])
        model.train()(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_run(path, base, talks):
    """Write a run folder whose adapter was trained on talks; its test rows are 40 others."""

    def train(model):
        tokenizer = AutoTokenizer.from_pretrained(base)
        file = write_rows(path.with_name(f"{path.name}-train.jsonl"), talks)
        examples, _ = tokenize_dataset(read_rows(file), tokenizer, max_seq_len=512, source_path=file)
        collator = make_collator(model, tokenizer.pad_token_id)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        draw = random.Random(0)
        for _ in range(150):
            with using_packed_attention(model):
                compute_step_loss(model.train(), collator(draw.sample(examples, 8))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    run = make_run(path, base, size=0.05, method={"rank": 16}, change=train)
    write_rows(path.with_name(f"{path.name}-rows.jsonl"), make_talks(40, seed=9))
    return run
