"""One line per method: its name and a small config for the tests that run over every method."""

from __future__ import annotations

from collections.abc import Callable

from slimtune import LoraConfig
from slimtune.contract.config import PeftConfig

CASES: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **more: LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | more),
}
