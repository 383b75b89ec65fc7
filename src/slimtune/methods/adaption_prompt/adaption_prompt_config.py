"""LLaMA-Adapter's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...core.adapters.config_fields import FieldError
from ...core.adapters.peft_config import PeftConfig, config_field
from ...errors import TargetError, format_names, suggest

if TYPE_CHECKING:
    from ...core.adapters.adapter_module import AdapterModule, AdapterSite, SiteKind


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter: gated attention to learned tokens; PEFT's field names and defaults."""

    name: ClassVar = "adaption_prompt"
    mergeable: ClassVar = False
    kinds: ClassVar = ("attention",)
    learning_rate: ClassVar = 9e-3
    recipe_defaults: ClassVar = {"adapter_len": 10}
    short_names: ClassVar = {"tokens": "adapter_len", "layers": "adapter_layers"}
    is_adaption_prompt: ClassVar = True

    target_modules: str | None = config_field(
        None, 'name of the attention modules ("self_attn"); None: found in the model'
    )
    adapter_len: int | None = config_field(None, "learned tokens of a layer, required; 10 in the paper", ge=1)
    adapter_layers: int | None = config_field(None, "how many layers get them, counted from the top; None: all", ge=1)

    def find_missing(self) -> Iterator[FieldError]:
        if self.adapter_len is None:
            yield self.error("adapter_len", "an integer, at least 1")

    def fill_from_model(self, model: Any) -> None:
        from ...extras.prompt_learning.learned_prefix import find_attention_module_names

        names = find_attention_module_names(model)
        self.target_modules = self.target_modules or names[0].rpartition(".")[2]
        self.adapter_layers = self.adapter_layers or len(names)

    def extra_targets(self, model: Any) -> dict[str, SiteKind]:
        """Return the attention modules of the top layers."""
        from ...extras.prompt_learning.learned_prefix import find_attention_module_names

        names = find_attention_module_names(model)
        matching = [n for n in names if n.endswith(f".{self.target_modules}")]
        if not matching:
            endings = sorted({n.rpartition(".")[2] for n in names})
            similar = suggest(str(self.target_modules), endings)
            message = f"target_modules={self.target_modules!r} names no attention module{similar}"
            raise TargetError(message, format_names(endings))
        count = self.adapter_layers or len(matching)
        if count > len(matching):
            raise TargetError(f"adapter_layers is {count}", f"at most the model's {len(matching)} layers")
        return dict.fromkeys(matching[-count:], "attention")

    def build(self, site: AdapterSite) -> AdapterModule:
        from .adaption_prompt_modules import GatedPrompt, Gpt2GatedPrompt

        module: Any = site.module
        if hasattr(module, "c_attn"):
            return Gpt2GatedPrompt(site, self)
        if not hasattr(module, "k_proj") or not hasattr(module, "v_proj") or hasattr(module, "k_norm"):
            raise TargetError(
                f"{site.name} is a {type(module).__name__}, which lacks k_proj and v_proj or normalizes its keys",
                "attention with k_proj and v_proj (Llama, Mistral, Qwen2, Gemma 2), or GPT-2's",
                "prefix tuning works on this model",
            )
        return GatedPrompt(site, self)
