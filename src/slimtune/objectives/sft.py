"""Supervised fine-tuning: cross-entropy of the answers.

loss = Σ −log p(token) / number of supervised tokens, both over the whole optimizer step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .token_objective import TokenObjective


@dataclass
class SFT(TokenObjective):
    """Cross-entropy of the supervised tokens, of preference pairs those of the chosen answers; it has no settings."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "answers, by cross-entropy (supervised fine-tuning)"
    formats: ClassVar[tuple[str, ...]] = ("chat", "instruction", "sharegpt", "prompt-completion", "text", "document")
    named_formats: ClassVar[tuple[str, ...]] = ("preference",)
