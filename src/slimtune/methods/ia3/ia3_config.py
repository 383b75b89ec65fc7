"""(IA)³'s settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.adapters.architectures import get_model_type
from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import FAN_IN_FAN_OUT_HELP, TargetedConfig, config_field
from ...errors import ConfigError, TargetError, format_names, suggest

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite


_QV, _KV, _DOWN = ["q_proj", "v_proj"], ["k_proj", "v_proj"], ["down_proj"]
SCALED: dict[str | None, tuple[list[str], list[str]]] = {
    **dict.fromkeys(("llama", "mistral"), (_KV, _DOWN)),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (_QV, _DOWN)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (["c_attn"], ["mlp.c_proj"])),
    **dict.fromkeys(("bert", "roberta"), (["key", "value"], ["output.dense"])),
    **dict.fromkeys(("gpt_neox", "falcon", "RefinedWebModel", "RefinedWeb"), (["query_key_value"], ["dense_4h_to_h"])),
    **dict.fromkeys(("phi", "bart"), (_QV, ["fc2"])),
    "bloom": (["query_key_value"], ["mlp.dense_4h_to_h"]),
    "mixtral": (_KV, ["w2"]),
    "opt": (["q_proj", "k_proj"], ["fc2"]),
    "gptj": (_QV, ["fc_out"]),
    "gpt_neo": (_QV, ["c_proj"]),
    "t5": (["k", "v"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
    "deberta": (["in_proj"], ["output.dense"]),
    "deberta-v2": (["key_proj", "value_proj"], ["output.dense"]),
}
"""PEFT's choice by architecture: layers whose output is scaled, and feed-forward layers whose input is scaled."""


@dataclass
class IA3Config(TargetedConfig):
    """(IA)³: one factor per output of a layer, or per input; PEFT's field names and defaults."""

    name: ClassVar = "ia3"
    prefix: ClassVar = "ia3_"
    sums_parameters: ClassVar = True
    fields_not_in_peft: ClassVar = frozenset(["layers_to_transform", "layers_pattern"])
    learning_rate: ClassVar = 1e-2
    kinds: ClassVar = ("linear", "conv")
    architecture_targets: ClassVar = {kind: [*scaled, *feedforward] for kind, (scaled, feedforward) in SCALED.items()}
    short_names: ClassVar = {"targets": "target_modules", "feedforward": "feedforward_modules"}

    feedforward_modules: list[str] | str | None = config_field(
        None, "targets whose input is scaled: names, endings, or a regular expression; None: PEFT's choice; []: none"
    )
    fan_in_fan_out: bool = config_field(False, FAN_IN_FAN_OUT_HELP)
    init_ia3_weights: bool = config_field(True, "start at one; False: normal random factors, for tests")

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        names, targets = self.feedforward_modules, self.target_modules
        if isinstance(names, list) and isinstance(targets, list) and not set(names) <= set(targets):
            yield FieldError("feedforward_modules", "`feedforward_modules` should be a subset of `target_modules`")

    def fill_from_model(self, model: Any) -> None:
        """Fill in PEFT's choice of feed-forward layers if none is given."""
        kind = get_model_type(model)
        if self.feedforward_modules is None and kind not in SCALED:
            raise ConfigError(
                f"feedforward_modules is None, and there is no default for {kind or type(model).__name__!r}",
                "the targets whose input is scaled",
                'give their names, such as ["down_proj"], or [] for none',
            )
        if self.feedforward_modules is None:
            self.feedforward_modules = list(SCALED[kind][1])

    def build(self, site: AdapterSite) -> AdapterModule:
        from .ia3_modules import ScaledInput, ScaledOutput, matches_suffix_or_regex

        is_feedforward = matches_suffix_or_regex(self.feedforward_modules or [], site.name)
        return (ScaledInput if is_feedforward else ScaledOutput)(site, self.init_ia3_weights)

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        """Return the factors at all sites; each of feedforward_modules must match one of them."""
        from .ia3_modules import matches_suffix_or_regex

        given = self.feedforward_modules or []
        default = SCALED.get(get_model_type(sites[0].model), ([], []))[1] if sites else given
        if given != default and not any(s.skip_init for s in sites):
            names = [s.name for s in sites]
            for pattern in [given] if isinstance(given, str) else given:
                if not any(matches_suffix_or_regex(given if isinstance(given, str) else [pattern], n) for n in names):
                    endings = sorted({n.rsplit(".", 1)[-1] for n in names})
                    message = (
                        f"feedforward_modules: {pattern!r} matches no target{suggest(pattern, [*endings, *names])}"
                    )
                    raise TargetError(message, f"targets are {format_names(endings)}")
        return super().build_all(sites)
