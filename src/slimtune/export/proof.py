"""Is what was written what was trained? Log-probabilities say, greedy text does not notice.

For each text and each of its positions: |log p(next token | merged) - log p(next token | base with adapter)|, in nats.
The same distance between the base alone and the base with its adapter is the adapter's effect: a difference means
something only beside it, since rounding merged weights to 16 bits can swallow a change that small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from torch import Tensor

from ..config import Recipe
from ..errors import RunError
from ..setup import open_rows_from_recipe

MOST_ROWS, MOST_TOKENS = 8, 256
QUESTIONS = (
    ("Define patience.", "A minor form of despair, disguised as a virtue."),
    ("What is the capital of France?", "The capital of France is Paris, a city of about two million people."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Translate into German: Good morning, how are you?", "Guten Morgen, wie geht es dir?"),
)
# What arithmetic alone makes (nats, on average), and the share of the adapter's effect that 16-bit weights may cost.
NOISE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
SHARE = 0.25


def texts(tokenizer: Any, recipe: Recipe | None, config: Any) -> list[list[int]]:
    """Return token ids of the texts to compare on: fixed questions, and the first validation (else test) rows.

    Args:
        tokenizer: of the base.
        recipe: the run's recipe, if there is one.
        config: of the model; texts longer than its context are cut.
    """
    return [ids for talk in talks(recipe) if len(ids := token_ids(tokenizer, talk, config)) > 1]


def talks(recipe: Recipe | None, rows: Path | None = None) -> list[list[dict[str, str]]]:
    """Return the conversations to compare on: fixed questions, and the first rows that were held out.

    Args:
        recipe: the run's, if there is one: its validation (else test) rows.
        rows: a file of rows to take instead.
    """
    found = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    held = (recipe.data.validation, recipe.data.test) if recipe is not None else ()
    if file := rows or next((f for f in held if f is not None and f.exists()), None):
        some = itertools.islice(open_rows_from_recipe(recipe if rows is None else None, file).rows(), MOST_ROWS)
        found += [row.messages for row in some if row.messages]
    return found


def token_ids(tokenizer: Any, talk: list[dict[str, str]], config: Any) -> list[int]:
    """Return a conversation's token ids, as many as are compared."""
    most = min(getattr(config, "max_position_embeddings", None) or MOST_TOKENS, MOST_TOKENS)
    return tokenizer(_text(tokenizer, talk), add_special_tokens=False)["input_ids"][:most]


def prompt(tokenizer: Any, talk: list[dict[str, str]]) -> str:
    """Return a conversation up to its last answer, as the chat template renders it; "" where it does not."""
    try:
        return tokenizer.apply_chat_template(talk[:-1], tokenize=False, add_generation_prompt=True)
    except (ValueError, TemplateError):
        return ""


@torch.no_grad()
def log_probabilities(model: Any, rows: Iterable[Sequence[int]]) -> Tensor:
    """Return log p of every token but each row's first, given those before it: one float64 vector over all rows."""
    device = next(model.parameters()).device
    found = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        # A few at a time: in float64, 256 positions of 128,000 tokens are a quarter of a GB.
        for part, following in zip(logits.split(32), ids[0, 1:, None].split(32), strict=True):
            found.append(part.double().log_softmax(-1).gather(-1, following)[:, 0].cpu())
    return torch.cat(found)


def require_same(
    merged: Tensor, adapted: Tensor, base: Tensor, stored: torch.dtype, computed: torch.dtype
) -> dict[str, Any]:
    """Compare log-probabilities of one shape; return `max_difference`, `mean_difference`, `effect` and `positions`.

    Args:
        merged: of the merged model.
        adapted: of the base with its adapter.
        base: of the base alone.
        stored: what the merged weights are stored in.
        computed: what the log-probabilities were computed in.

    Raises:
        RunError: the merged model is another one.
    """
    apart, effect = (merged - adapted).abs(), (adapted - base).abs().mean().item()
    worst, mean = apart.max().item(), apart.mean().item()
    share = SHARE if min(stored.itemsize, computed.itemsize) == 2 else 0.0
    allowed = share * effect + max(NOISE[stored], NOISE[computed])
    if not math.isfinite(worst) or mean > allowed:
        raise RunError(
            f"the merged model is not the trained one: its log-probabilities differ by {mean:.3g} nats on average "
            f"(at most {worst:.3g}) over {len(apart)} positions; the adapter itself changes them by {effect:.3g}",
            f"at most {allowed:.3g} nats on average",
            "--dtype float32: 16 bits cannot hold so small a change" if stored.itemsize == 2 else "",
        )
    return {"max_difference": worst, "mean_difference": mean, "effect": effect, "positions": len(apart)}


def require_whole(folder: Path, model: Any) -> None:
    """Count the numbers in a saved folder's weight files, by their headers alone, against the model's.

    Raises:
        RunError: some are missing, or there are too many.
    """
    skipped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    # Tied tensors are one in the file; by address, since names may change on the way to the file.
    wanted = sum({t.data_ptr(): t.numel() for n, t in model.state_dict().items() if n not in skipped}.values())
    held = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as f:
            held += sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118
    if held != wanted:
        raise RunError(f"the saved checkpoint holds {held} numbers", f"the model's {wanted}", "please report this")


def _text(tokenizer: Any, talk: list[dict[str, str]]) -> str:
    try:
        return tokenizer.apply_chat_template(talk, tokenize=False)
    except (ValueError, TemplateError):  # no template, or one that wants other roles: plain text compares as well
        return "\n".join(m["content"] for m in talk)
