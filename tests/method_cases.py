"""One line per method: a small config for the tests that run over each; `name+variant` is one more of a method."""

from dataclasses import dataclass, field
from typing import Any

import slimtune
from slimtune.core.adapters.method_registry import METHODS, get_method_config_class, list_methods
from slimtune.core.adapters.peft_config import PeftConfig


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
        return getattr(slimtune, self.config, None) or get_method_config_class(self.config)

    def __call__(self, **more: Any) -> PeftConfig:
        return self.cls(**{**self.settings, **more})


ALL = {"target_modules": "all-linear"}
FIVE, THREE = {"num_virtual_tokens": 5}, {"num_virtual_tokens": 3}
CASES: dict[str, Case] = {
    "lora": Case("LoraConfig", {"r": 4, "lora_alpha": 16, **ALL}, {"r": 2}),
    "lora+dora": Case("LoraConfig", {"use_dora": True, "r": 4, **ALL}, {"r": 2}, exact_gradient=False),
    "lora+pissa": Case("LoraConfig", {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 8, **ALL}, {"r": 2}),
    "lora+olora": Case("LoraConfig", {"init_lora_weights": "olora", "r": 4, **ALL}, {"r": 2}),
    "lora+mica": Case("LoraConfig", {"init_lora_weights": "mica", "r": 4, **ALL}, {"r": 2}),
    "lora+fa": Case("LoraConfig", {"freeze_a": True, "lr_ratio": 4, "r": 4, **ALL}, {"r": 2}),
    "lora+tokens": Case(
        "LoraConfig", {"trainable_token_indices": [117, 3, 17, 27], "r": 4, **ALL},
        {"trainable_token_indices": [94, 14], "r": 2},
    ),
    "trainable_tokens": Case("TrainableTokensConfig", {"token_indices": [117, 3, 17, 27]}, {"token_indices": [94, 14]}),
    "prompt_tuning": Case("PromptTuningConfig", FIVE, THREE, identity=False),
    "p_tuning": Case("PromptEncoderConfig", FIVE, THREE, identity=False),
    "p_tuning+lstm": Case("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12,
                          **FIVE}, THREE, identity=False),
    "prefix_tuning": Case("PrefixTuningConfig", FIVE, THREE, identity=False),
    "prefix_tuning+projection": Case("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12,
                                     **FIVE}, THREE, identity=False),
    "adaption_prompt": Case("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}, {"adapter_len": 3}),
    "full": Case("FullConfig"),
    "ia3": Case("IA3Config"),
    "ln_tuning": Case("LNTuningConfig"),
    # GPT-2 has biases, all but at the head.
    "bitfit": Case("BitFitConfig", {"new_biases": True}, on_gpt2={"target_modules": ["lm_head", "ln_f"]}, merges=False),
    "loha": Case("LoHaConfig", {"r": 2, "alpha": 4, **ALL}, {"r": 1}),
    "loha+wide": Case("LoHaConfig", {"r": 6, "alpha": 12, **ALL}, {"r": 5}),
    "lokr": Case("LoKrConfig", {"r": 2, "alpha": 4, **ALL}, {"r": 1}),
    "lokr+whole": Case("LoKrConfig", {"r": 8, "alpha": 16, **ALL}, {"decompose_factor": 2}),
    "lokr+both": Case("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True, **ALL}, {"init_weights": "lycoris"}),
    "miss": Case("MissConfig", {"r": 5, **ALL}, {"r": 4}),
    "miss+mini": Case("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini", **ALL}, {"r": 2}),
    "miss+bat": Case("MissConfig", {"r": 4, "init_weights": "bat", **ALL}, {"r": 2}),
    "vera": Case("VeraConfig", {"r": 8, **ALL}, {"r": 5}),
    "hira": Case("HiraConfig", {"r": 4, **ALL}, {"r": 2}),
    "shira": Case("ShiraConfig", {"r": 4, **ALL}, {"r": 2}),
    "bottleneck": Case("BottleneckConfig", {"reduction_factor": 4}, {"reduction_factor": 8}),
    "bottleneck+houlsby": Case("BottleneckConfig", {"style": "houlsby", "bottleneck_size": 6}, {"bottleneck_size": 3}),
    "bottleneck+parallel": Case("BottleneckConfig", {"style": "parallel", "scaling": "channel"}, {"scaling": 2.0}),
    "oft": Case("OFTConfig", {"oft_block_size": 8, **ALL}, {"oft_block_size": 4}),
    "oft+exact": Case("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False, **ALL}, {"block_share": True}),
    "oft+coft": Case("OFTConfig", {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.5, **ALL}, {"r": 2},
                     exact_gradient=False),
    "adalora": Case("AdaLoraConfig", {"init_r": 5, "target_r": 2, "lora_alpha": 16, **ALL}, {"init_r": 3}),
}  # fmt: skip
# A third party's method runs with its own defaults.
CASES |= {name: Case(name, ALL) for name in set(list_methods()) - set(METHODS.built_in_names())}


def config(method: str, base: str = "llama", **more: Any) -> PeftConfig:
    """Return a method's config for a tiny model."""
    return CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}), **more)
