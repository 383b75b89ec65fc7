"""Adapters that are loaded in Python are compared with the model that they are put on: `PeftModel.from_pretrained`.

The model's config, and the weight files of the folder or Hub id that it was loaded from, are compared with what the
adapter's file says that it was trained on. What differs is a warning, since the model is the caller's; `with
accept_changes(("weights",)):` loads without it. The tokenizer is not seen here. Files of other libraries say nothing.
"""

import warnings
from collections.abc import Mapping

from ..core.adapters.adapter_files import TRAINING_FINGERPRINT, get_base_config
from ..core.adapters.peft_model import PeftModel
from ..errors import PeftWarning


class TrainedBaseCheckMixin(PeftModel):
    """Mixed into adapted models: compares what a loaded adapter was trained on."""

    def note_loaded_adapter(self, adapter_name: str, source: str, metadata: Mapping[str, str]) -> None:
        """Warn if the base has changed since the adapter was trained; keep what the adapter says of its base.

        Its rows and recipe are not kept: it may be trained further.
        """
        super().note_loaded_adapter(adapter_name, source, metadata)
        fingerprints = self.adapter_state.training_fingerprints
        fingerprints.pop(adapter_name, None)
        if TRAINING_FINGERPRINT not in metadata:
            return
        from .training_fingerprint import TrainingFingerprint, describe_changed_model  # imports what a training needs

        try:
            before = TrainingFingerprint.from_json(metadata[TRAINING_FINGERPRINT])
            texts = describe_changed_model(self, get_base_config(self), source, before)
        except (ValueError, TypeError, AttributeError, RecursionError):
            texts = [f"what {source} says it was trained on is damaged: whether its base has changed is not proven"]
        else:
            fingerprints[adapter_name] = before.get_base_parts().to_json()
        for text in texts:
            warnings.warn(text, PeftWarning, stacklevel=3)
