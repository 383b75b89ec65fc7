"""AutoPeftModel: an adapter folder names its base, so one call loads both."""

from __future__ import annotations

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
"""transformers' class for a base by the adapter's task."""


class AutoPeftModel:
    """An adapter and its base, of the class that the adapter's config tells."""

    auto_class: ClassVar[str] = ""
    """Name of transformers' class for the base; "": what the adapter's config says."""

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
            adapter_name: name the adapter gets.
            is_trainable: whether it will train on.
            config: the adapter's config, where it is read already.
            revision: revision of the adapter on the Hub.
            base_settings: passed to the base's `from_pretrained` (dtype, device_map, …).

        Raises:
            UsageError: the adapter is for another task than this class.
            AdapterError: the adapter names no base, or one that cannot be loaded here, or does not fit it.
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
                f"{pretrained_model_name_or_path} names the base {base!r}, which is no folder here, and the Hub did "
                f"not give it: {type(e).__name__}",
                "a folder, or a model on the Hub",
                f"slimtune.load_run({str(pretrained_model_name_or_path)!r}) knows slimtune's own names of bases; or "
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
                    f"{where} is an adapter for {config.task_type}", f"{right} or AutoPeftModel", f"{right}.{_CALL}"
                )
            return cls.auto_class
        noted = config.auto_mapping or {}
        named = str(noted.get("base_model_class"))
        # Names alone, and transformers' own: a config must not choose what code runs.
        if by_task or (
            str(noted.get("parent_library")).split(".")[0] == "transformers" and hasattr(transformers, named)
        ):
            return by_task or named
        raise AdapterError(
            f"{where} tells neither its task nor a class of transformers for its base",
            "task_type or auto_mapping in adapter_config.json",
            f"AutoPeftModelForCausalLM.{_CALL}, or another that names the task",
        )


_CALL = "from_pretrained(...)"


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter and its causal language model."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter and its encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter and its sequence classifier."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter and its token classifier."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter and its model that finds answers in a text."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter and its encoder."""

    auto_class = "AutoModel"
