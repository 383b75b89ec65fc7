"""What a run is, before its base is loaded: where its base is, and whether it writes text."""

from pathlib import Path

from ..core.adapters.peft_config import PeftConfig
from ..core.models.model_source import ModelSource, resolve_model_source
from ..core.training.run_dir import RunDir, find_adapter_folder
from ..errors import UsageError


def resolve_trained_base(run: Path) -> ModelSource:
    """Return where the base of a run or an adapter folder is, without loading it."""
    if (folder := find_adapter_folder(run)) != run:
        return resolve_model_source(RunDir.open(run).load_recipe().model.name)
    return resolve_model_source(PeftConfig.from_pretrained(folder).base_model_name_or_path or "")


def require_causal_lm_run(run: str | Path) -> None:
    """Raise UsageError if a run trained a classifier or a reward model."""
    if PeftConfig.from_pretrained(find_adapter_folder(run)).task_type == "SEQ_CLS":
        raise UsageError(
            f"{run} is a classifier or a reward model: it writes no text, and neither llama.cpp (GGUF, Ollama) nor "
            "vLLM's adapters serve its head",
            "a run of a language model",
            "slimtune eval or merge, or HF PEFT over AutoModelForSequenceClassification: docs/classification.md",
        )
