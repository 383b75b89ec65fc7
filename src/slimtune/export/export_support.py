"""Which export formats an adapter supports, judged by its modules and config rather than by a list of methods.

Requirements on the base model (an architecture that llama.cpp or vLLM knows) are checked at export time.
"""

from typing import Any

from torch import Tensor

from ..core.training.train_result import ExportSupport
from ..errors import format_names

Factors = tuple[Tensor, Tensor, float]
"""`A (r, in)`, `B (out, r)` and the scale of an update; of stacked experts `(experts, r, in)`, `(experts, out, r)`."""
_NOT_IN_VLLM = {
    "modules_to_save": "vLLM does not load modules trained in full",
    "bias": "vLLM does not load trained biases",
    "lora_bias": "vLLM does not support a bias on B",
    "alora_invocation_tokens": "vLLM would change every token",
    "trainable_token_indices": "vLLM does not load single rows of an embedding",
}
"""Fields of a config whose value, if there is one, no LoRA in vLLM can express."""


def get_export_support_flags(
    model: Any, adapter_name: str = "default", *, on_published_base: bool = True
) -> ExportSupport:
    """Return the export formats of a model's adapter.

    `on_published_base` says whether the adapter belongs to the base as it was published; False after a LoftQ
    initialisation, which changed the base in memory.
    """
    config = model.peft_config[adapter_name]
    factors, other = split_low_rank_and_other_changes(model, adapter_name)
    replicated = bool(getattr(config, "layer_replication", None))
    on_published_base = on_published_base and not replicated  # the published one has fewer layers
    can_be_lora = on_published_base and not list_settings_no_vllm_lora_expresses(config)
    merged = (
        config.mergeable
        and not replicated
        and all(m.base_can_store_merge for m in model.adapter_modules(adapter_name).values())
    )
    kinds = set(model.match_report(adapter_name).kinds.values())
    return ExportSupport(
        merged=merged,
        gguf=on_published_base and bool(factors) and not other,
        vllm=can_be_lora and not kinds & {"conv", "weight"} and not list_vllm_plain_lora_incompatibilities(config),
        as_lora=can_be_lora and merged and bool(kinds) and kinds <= {"linear", "embedding"},
    )


def split_low_rank_and_other_changes(model: Any, adapter_name: str = "default") -> tuple[dict[str, Factors], list[str]]:
    """Return an adapter's updates of linear layers by module, in the model's order, and a list of its other changes.

    Updates of stacked experts are under the parameter's name.
    """
    factors: dict[str, Factors] = {}
    report = model.match_report(adapter_name)
    other = [
        f"{name} ({format_names(parameters)} trained in full)"
        for name, parameters in report.trained_parameter_copies.items()
    ]
    for name, module in model.adapter_modules(adapter_name).items():
        if experts := module.expert_factors():
            factors |= {f"{name}.{parameter}": found for parameter, found in experts.items()}
            continue
        found = module.low_rank_factors() if report.kinds[name] == "linear" else None
        if found is None:
            other.append(f"{name} ({type(module).__name__})")
        else:
            factors[name] = found
    return factors, other


def list_settings_no_vllm_lora_expresses(config: Any) -> list[str]:
    """Return the parts of an adapter that no LoRA can express in vLLM, one clause each."""
    given = {name: getattr(config, name, None) for name in _NOT_IN_VLLM}
    reasons = [f"{n} is {value!r}: {_NOT_IN_VLLM[n]}" for n, value in given.items() if value and value != "none"]
    if getattr(config, "init_lora_weights", None) == "loftq":
        reasons.append("init_lora_weights is 'loftq': the adapter belongs to the quantized base it compensates")
    return reasons


def list_vllm_plain_lora_incompatibilities(adapter_config: Any) -> list[str]:
    """Return why vLLM cannot load an adapter as it is, although it may load a LoRA that approximates it."""
    if not adapter_config.uses_lora_file_format:
        return [f"its method is {adapter_config.name}, and vLLM only loads LoRA"]
    if parameters := [p for p in adapter_config.target_parameters or [] if not p.endswith(".weight")]:
        return [f"target_parameters is {parameters}: vLLM reads a LoRA on experts for some architectures only"]
    return ["use_dora is True: vLLM does not support DoRA"] if adapter_config.use_dora else []
