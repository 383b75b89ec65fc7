"""AutoPeftModel: an adapter folder names its base, so one call loads both."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers

from ..contract.config import PeftConfig
from ..errors import AdapterError
from .model import PeftModel


class _AutoPeftModel:
    auto_class: ClassVar[str] = "AutoModel"

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
            AdapterError: the adapter names no base, or does not fit it.
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
        model = getattr(transformers, cls.auto_class).from_pretrained(base, revision=config.revision, **base_settings)
        return PeftModel.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config, **hub
        )


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """An adapter and its causal language model."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """An adapter and its encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """An adapter and its sequence classifier."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """An adapter and its token classifier."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """An adapter and its encoder."""

    auto_class = "AutoModel"
