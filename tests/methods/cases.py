"""One line per method: a small config for the tests that run over each; `name+variant` is one more of a method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import slimtune.methods
from slimtune.contract.config import PeftConfig


@dataclass(frozen=True)
class Case:
    """A method as the contract test runs it.

    Args:
        config: name of the config class.
        settings: a config that adapts a tiny Llama and a tiny GPT-2 alike.
        other: what is different in a second adapter of the method beside the first: another size.
        identity: promised: attached, the model says bit for bit what it said.
        on_gpt2: settings for a tiny GPT-2 where it needs its own.
        merges: these settings can be merged into the tiny models, where the method can at all.
        exact_gradient: the gradient is the whole derivative (DoRA leaves out the norm's, by design).
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    on_gpt2: dict[str, Any] = field(default_factory=dict)
    merges: bool = True
    exact_gradient: bool = True

    @property
    def cls(self) -> type[PeftConfig]:
        return getattr(slimtune, self.config, None) or slimtune.methods.config_class(self.config)

    def __call__(self, **more: Any) -> PeftConfig:
        return self.cls(**{**self.settings, **more})


ALL = {"target_modules": "all-linear"}
CASES: dict[str, Case] = {
    "lora": Case("LoraConfig", {"r": 4, "lora_alpha": 16, **ALL}, {"r": 2}),
}
# A third party's method runs with its own defaults.
CASES |= {name: Case(name, ALL) for name in set(slimtune.methods.names()) - set(slimtune.methods.built_in())}
