"""Adapters that each say one letter again and again, so that a wrong adapter shows in the text."""

from pathlib import Path
from typing import Any

import torch
from hand_run import make_run

LETTERS = "abcd"
"""The letter of each run, a byte of the tests' tokenizer; the name of the run is `says-a`, …"""


def train_to_say(token: int) -> Any:
    """Return a change for `make_run` that trains the adapter to answer any text by this token."""

    def change(model: Any) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for step in range(12):
            draws = torch.Generator().manual_seed(step)
            ids = torch.randint(3, 259, (8, 24), generator=draws)
            ids[:, 12:] = torch.where(torch.rand(8, 1, generator=draws) < 0.5, token, ids[:, 12:])
            logits = model(ids).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), token))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.001

    return change


def make_one_letter_runs(base: Path, tokenizer: Any) -> list[Path]:
    return [
        make_run(
            base.parent / f"says-{letter}",
            base,
            method={"rank": 8, "alpha": 32, "target_modules": ["v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]},
            change=train_to_say(tokenizer.convert_tokens_to_ids(letter)),
        )
        for letter in LETTERS
    ]
