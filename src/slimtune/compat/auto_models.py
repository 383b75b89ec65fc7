"""AutoPeftModel: load an adapter and the base that its config names in one call."""

import os
from typing import Any

import transformers

from ..core.adapters.peft_config import PeftConfig
from ..core.adapters.peft_model import PeftModel
from ..errors import AdapterError, UsageError
from .model_names import TASK_MODELS

_BY_TASK = {task: cls.__name__.replace("PeftModel", "AutoModel") for task, cls in TASK_MODELS.items()}
"""Class for the base by the adapter's task; for feature extraction transformers' name is AutoModel."""
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = TASK_MODELS
"""PEFT's name of the classes of an adapted model by the adapter's task."""


_AUTO_CLASSES = {"AutoModel", *_BY_TASK.values(), "AutoModelForImageTextToText", "AutoModelForMaskedLM"}


class AutoPeftModel:
    """Loads an adapter and its base. The adapter's config, or the name of a subclass, determines the base's class."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **base_settings: Any,
    ) -> PeftModel:
        """Load the base that an adapter folder or Hub repository names, and the adapter onto it.

        `base_settings` go to the base's `from_pretrained` (dtype, device_map, …), the others to `PeftModel`'s.

        Raises:
            UsageError: the adapter is for another task than this class.
            AdapterError: the adapter names no base, or one that cannot be loaded, or does not fit it.
        """
        path = pretrained_model_name_or_path
        hub: dict[str, Any] = {"revision": revision} if revision else {}
        config = config or PeftConfig.from_pretrained(path, **hub)
        base = config.base_model_name_or_path
        load_yourself = "load the base yourself, then PeftModel.from_pretrained(base, path)"
        if not base:
            raise AdapterError(
                f"{path} does not name its base",
                "base_model_name_or_path in its config",
                load_yourself,
                code="wrong-base",
            )
        class_name = cls._get_base_class(config, path).replace("AutoModelForFeatureExtraction", "AutoModel")
        # Otherwise transformers asks on the terminal whether to run a base's code, and reads pickles.
        base_settings = {"trust_remote_code": False, "use_safetensors": True, **base_settings}
        try:
            model = getattr(transformers, class_name).from_pretrained(base, revision=config.revision, **base_settings)
        except (OSError, ValueError, ImportError) as e:
            if os.path.isdir(base) or not isinstance(e, OSError):
                raise AdapterError(f"the base {base!r} of {path} could not be loaded: {e}", hint=load_yourself) from e
            raise AdapterError(
                f"{path} names the base {base!r}, which is not a local folder and could not be loaded from the Hub: "
                f"{type(e).__name__}",
                hint=f"slimtune.load_run({str(path)!r}) resolves short names of bases; or {load_yourself}",
            ) from e
        return PeftModel.from_pretrained(model, path, adapter_name, is_trainable=is_trainable, config=config, **hub)

    @classmethod
    def _get_base_class(cls, config: PeftConfig, path: str | os.PathLike) -> str:
        mapping = config.auto_mapping or {}
        # Only classes of transformers: a config must not choose which code runs.
        library = str(mapping.get("parent_library", "transformers")).split(".")[0]
        # A base whose code comes with it needs trust_remote_code.
        if library not in ("transformers", "transformers_modules") and config.task_type is None:
            message = f"{library!r} is the base's library, which is not in the import allowlist: {path}"  # PEFT's words
            raise AdapterError(message, "a class of transformers", "load the base, then PeftModel.from_pretrained")
        own = next(c for c in cls.__mro__ if c.__module__ == __name__).__name__.replace("Peft", "")
        by_task = _BY_TASK.get(str(config.task_type), "")
        if own != "AutoModel":
            if by_task not in ("", own):
                right = f"{by_task.replace('Auto', 'AutoPeft')} or AutoPeftModel"
                raise UsageError(f"{path} is an adapter for {config.task_type}", right)
            return own
        if by_task:
            return by_task
        class_name = str(mapping.get("base_model_class"))
        found = getattr(transformers, class_name, None) if library == "transformers" else None
        if isinstance(found, type) and (issubclass(found, transformers.PreTrainedModel) or class_name in _AUTO_CLASSES):
            return class_name
        message = f"the config of {path} gives neither a task nor a class of transformers for its base"
        raise AdapterError(
            message, hint="AutoPeftModelForCausalLM.from_pretrained(...), or another that names the task"
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads an adapter and its causal language model."""


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an adapter and its encoder-decoder."""


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads an adapter and its sequence classifier."""


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads an adapter and its token classifier."""


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an adapter and its extractive question-answering model."""


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an adapter and its encoder."""
