"""PEFT's names on adapted models: attributes, status, virtual tokens, and a class for each task."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.adapters.peft_model import PeftModel
from ..errors import UsageError
from ..extras.prompt_learning.prompt_modules import LearnedPromptEmbeddingsMixin, require_backbone_names
from .adapter_status import get_layer_status, get_model_status
from .base_model_wrapper import PeftTunerOfModel, get_backbone
from .target_functions import _get_module_names_tied_with_embedding


class PeftModelNamesMixin(PeftModel):
    """Mixed into adapted models: what PEFT's `PeftModel` has besides."""

    special_peft_forward_args: ClassVar = {"adapter_names"}
    """Arguments of a call that the base does not know."""

    get_layer_status = get_layer_status
    get_model_status = get_model_status
    _get_module_names_tied_with_embedding = _get_module_names_tied_with_embedding

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT's `peft_model.model` is the base: see `get_peft_model_attribute`.
        backbone = get_backbone(self)
        if name in backbone._modules and name not in self._modules:
            setattr(backbone, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list unless exactly one is active."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def prefix(self) -> str:
        """How the names of the active adapter's tensors start: `"lora_"`; AttributeError without a common start."""
        if not self.active_peft_config.prefix:
            raise AttributeError(f"the tensors of {self.active_peft_config.name} have no common prefix")
        return self.active_peft_config.prefix

    @property
    def peft_type(self) -> str | None:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full, None if there are none."""
        return {n for r in self.adapter_state.reports.values() for n in r.trained_whole} or None

    @property
    def base_model(self) -> Any:
        """The backbone, as in transformers; `base_model.model` is the whole model, as in PEFT: see `base_model.py`."""
        backbone = get_backbone(self)
        return PeftTunerOfModel(self) if backbone is self and "model" in self._modules else backbone

    def get_base_model(self) -> Any:
        return self  # the same object

    def disable_adapter_layers(self) -> None:
        """Run the base alone, with frozen adapters, until `enable_adapter_layers` is called."""
        self.unmerge_adapter()
        self.set_requires_grad(self.active_adapters, False)
        self.adapter_state.active_state.enabled = False
        self.reset_layer_selections()

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`: the active adapters run and train."""
        self.adapter_state.active_state.enabled = True
        self.set_requires_grad(self.active_adapters)
        self.reset_layer_selections()

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Make the output of the input embeddings require gradients, which reentrant checkpointing needs."""
        self.require_input_gradients()

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter runs in a call."""
        return bool(self.adapter_state.active_state.names)

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype of the base."""
        return getattr(self, "dtype", None)

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the modules that adapters change."""
        kinds = {n: kind for a in self.peft_config for n, kind in self.match_report(a).kinds.items()}
        return [name for name, kind in kinds.items() if kind != "parameters"]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the parameters that the active adapter changes without their module."""
        modules = self.adapter_modules(self.active_adapters[0]).items()
        return [f"{name}.{parameter}" for name, module in modules for parameter in module.adapted_parameters]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether a LoRA can approximate the adapter: it changes weights of linear layers and embeddings."""
        kinds = set(self.match_report(adapter_name).kinds.values())
        return self.peft_config[adapter_name].mergeable and kinds <= {"linear", "embedding"}

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the active adapter's virtual tokens `(batch, n, hidden)`, or its prefix as a cache.

        `task_ids` and `max_cache_len`, which other methods of PEFT need, are ignored.
        """
        return _require_learned(self, self.active_adapters[0]).get_prompt(batch_size)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the tensor `prompt_embeddings` of an adapter's file."""
        return _require_learned(self, adapter_name).tensors()["prompt_embeddings"].detach().cpu()


def get_peft_model_attribute(model: PeftModel, name: str) -> Any:
    """Return what PEFT calls `name` on a model that has no such attribute; a base's own modules come first.

    `prompt_encoder` has the modules with the learned embeddings and `prompt_tokens` the indices of the virtual tokens,
    both by adapter; `word_embeddings` are the token embeddings.

    Raises:
        AttributeError: PEFT has no such name there.
    """
    if name == "model":
        return model
    if name in get_backbone(model)._modules:
        return get_backbone(model)._modules[name]
    learned: dict[str, Any] = {}
    if name in ("prompt_encoder", "prompt_tokens", "word_embeddings"):
        learned = {n: m for a in model.peft_config for n, m in [(a, _find_learned(model, a))] if m is not None}
    if not learned:
        raise AttributeError(name)
    if name == "prompt_encoder":
        return nn.ModuleDict({n: m.prompt_encoder for n, m in learned.items()})
    if name == "prompt_tokens":
        configs: dict[str, Any] = {n: model.peft_config[n] for n in learned}
        return {n: torch.arange(c.num_virtual_tokens * c.num_transformer_submodules) for n, c in configs.items()}
    reader: Any = model.get_submodule(require_backbone_names(model).reader)
    return reader.get_input_embeddings()


def _find_learned(model: PeftModel, adapter: str) -> LearnedPromptEmbeddingsMixin | None:
    modules = model.adapter_modules(adapter).values()
    return next((m for m in modules if isinstance(m, LearnedPromptEmbeddingsMixin)), None)


def _require_learned(model: PeftModel, adapter: str) -> LearnedPromptEmbeddingsMixin:
    found = _find_learned(model, adapter)
    if found is None:
        raise UsageError(f"adapter {adapter!r} has no virtual tokens", "an adapter of a prompt learning method")
    return found


# --- classes for isinstance -------------------------------------------------------------------------------------------


class PeftModelForSequenceClassification(PeftModel):
    """A model with adapters for `task_type="SEQ_CLS"`."""


class PeftModelForCausalLM(PeftModel):
    """A model with adapters for `task_type="CAUSAL_LM"`."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A model with adapters for `task_type="SEQ_2_SEQ_LM"`."""

    def generate(self, **kwargs: Any) -> Any:
        """Generate like the base; as in PEFT all arguments have names, for instance `input_ids`."""
        return super().generate(**kwargs)


class PeftModelForTokenClassification(PeftModel):
    """A model with adapters for `task_type="TOKEN_CLS"`."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model with adapters for `task_type="QUESTION_ANS"`."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model with adapters for `task_type="FEATURE_EXTRACTION"`."""


class PeftMixedModel(PeftModel):
    """A model from `get_peft_model(…, mixed=True)`; any model can have adapters of different methods."""


TASK_MODELS: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
"""The class of a model by the task type of its first adapter's config."""
