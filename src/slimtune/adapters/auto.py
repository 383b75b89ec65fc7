"""AutoPeftModel: load an adapter and the base that its config names in one call."""

import os
from typing import Any, ClassVar

import transformers

from ..errors import AdapterError, UsageError
from .config import PeftConfig
from .model import PeftModel

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Class of transformers for the base by the adapter's task."""


class AutoPeftModel:
    """Loads an adapter and its base; the adapter's config determines the base's class."""

    auto_class: ClassVar[str] = ""
    """Name of transformers' class for the base; "": take it from the adapter's config."""

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
        """Load the base an adapter names, and the adapter onto it.

        Args:
            pretrained_model_name_or_path: an adapter folder or Hub repository.
            adapter_name: name of the adapter in the model.
            is_trainable: True to continue training.
            config: the adapter's config, if it is already loaded.
            revision: revision of the adapter on the Hub.
            base_settings: arguments of the base's `from_pretrained` (dtype, device_map, …).

        Raises:
            UsageError: the adapter is for another task than this class.
            AdapterError: the adapter names no base, or one that cannot be loaded, or does not fit it.
        """
        hub: dict[str, Any] = {"revision": revision} if revision else {}
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        base = config.base_model_name_or_path
        if not base:
            raise AdapterError(
                f"{pretrained_model_name_or_path} does not name its base",
                "base_model_name_or_path in adapter_config.json",
                "load the base yourself, then PeftModel.from_pretrained(base, path)",
            )
        auto: Any = getattr(transformers, cls._class_for(config, pretrained_model_name_or_path))
        try:
            model = auto.from_pretrained(base, revision=config.revision, **base_settings)
        except OSError as e:
            if os.path.isdir(base):
                raise
            raise AdapterError(
                f"{pretrained_model_name_or_path} names the base {base!r}, which is not a local folder and could "
                f"not be loaded from the Hub: {type(e).__name__}",
                "a folder, or a model on the Hub",
                f"slimtune.load_run({str(pretrained_model_name_or_path)!r}) resolves short names of bases; or "
                "load the base yourself, then PeftModel.from_pretrained(base, path)",
            ) from e
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config, **hub
        )

    @classmethod
    def _class_for(cls, config: PeftConfig, where: str | os.PathLike) -> str:
        by_task = _BY_TASK.get(str(config.task_type), "")
        if cls.auto_class:
            if by_task not in ("", cls.auto_class):
                right = f"AutoPeft{by_task.removeprefix('Auto')}"
                raise UsageError(
                    f"{where} is an adapter for {config.task_type}",
                    f"{right} or AutoPeftModel",
                    f"{right}.from_pretrained(...)",
                )
            return cls.auto_class
        if by_task:
            return by_task
        mapping = config.auto_mapping or {}
        class_name = str(mapping.get("base_model_class"))
        # Only classes of transformers: a config must not choose which code runs.
        library = str(mapping.get("parent_library")).split(".")[0]
        if library == "transformers" and hasattr(transformers, class_name):
            return class_name
        raise AdapterError(
            f"the config of {where} gives neither a task nor a class of transformers for its base",
            "task_type or auto_mapping in adapter_config.json",
            "AutoPeftModelForCausalLM.from_pretrained(...), or another that names the task",
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads an adapter and its causal language model."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an adapter and its encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads an adapter and its sequence classifier."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads an adapter and its token classifier."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an adapter and its extractive question-answering model."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an adapter and its encoder."""

    auto_class = "AutoModel"
