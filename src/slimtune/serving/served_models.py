"""The models that the server offers: the base, and one for each run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.adapters.active_adapters import BASE_ROW
from ..core.adapters.peft_model import get_peft_model
from ..core.models.loader import load_base
from ..core.training.trained_model import TrainedModel
from ..errors import UsageError
from ..generation.generation_models import GenerationModel, make_generation_model
from ..generation.multi_run_loading import load_trained_models_sharing_base
from ..generation.run_requirements import require_causal_lm_run
from ..methods.lora import LoraConfig
from .tool_calls import ToolCallFormat, detect_json_tool_call_format


@dataclass(frozen=True, kw_only=True)
class ServedModel(GenerationModel):
    """The base or a run, as requests name it."""

    name: str
    max_length: int  # tokens of a prompt and its answer together
    vocab_size: int
    parent: str | None = None  # name of the base
    tool_calls: ToolCallFormat | None = None  # None: the template writes no calls


def parse_run_names(texts: Sequence[str]) -> dict[str, Path]:
    """Return the runs by the names of their models; a text is `RUN` or `NAME=RUN`.

    The name of a run is that of its folder, the name of an adapter folder called "adapter" that of the run it is in.

    Raises:
        UsageError: two runs have the same name.
    """
    runs: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path = Path(rest if equals and not Path(text).exists() else text)
        if path == Path(text):
            folder = path.resolve()
            name = folder.parent.name if folder.name == "adapter" else folder.name
        if not name or name in runs:
            problem = f"{runs[name]} and {path} would both be the model {name!r}" if name else f"{text} has no name"
            raise UsageError(problem, "a name of its own for each run", f"write NAME={path}")
        runs[name] = path
    return runs


def load_served_models_and_first_run(
    runs: dict[str, Path], *, device: str | None = None, max_length: int = 4096
) -> tuple[list[ServedModel], TrainedModel]:
    """Load the runs on one base; return the models, the base first, and the first run as it was loaded.

    Args:
        runs: run folders or adapter folders by name.
        device: as for `load_trained_models_sharing_base`.
        max_length: most tokens of a prompt and its answer; a base with a shorter context has less.

    Raises:
        UsageError: as for `load_trained_models_sharing_base`, or a run has the name of the base.
    """
    for path in runs.values():
        require_causal_lm_run(path)
    loaded = load_trained_models_sharing_base(list(runs.values()), device=device)
    return make_served_base_and_run_models(runs, loaded, max_length), loaded[0]


def load_base_without_runs(
    name: str, *, dtype: str = "auto", device: str | None = None, max_length: int = 4096
) -> tuple[list[ServedModel], TrainedModel]:
    """Load a base that adapters are added to later; return it as a model, and as it was loaded.

    It has a LoRA of rank 1 that changes nothing and that no model uses, because a model without any has no rows.

    Args:
        name: alias, GGUF file, folder or Hub id.
        dtype: of its weights, as for `load_base`.
        device, max_length: as for `load_served_models_and_first_run`.
    """
    base = load_base(name, dtype=dtype, device=device or "auto")
    model = get_peft_model(base.model, LoraConfig(r=1, target_modules="all-linear")).eval()
    loaded = TrainedModel(model, base, Path(), None)
    return [make_served_model(base.source.name, loaded, BASE_ROW, max_length)], loaded


def make_served_base_and_run_models(
    runs: Mapping[str, Path], loaded_runs: Sequence[TrainedModel], max_length: int
) -> list[ServedModel]:
    """Return the models of runs that are loaded on one base, the base first; raise UsageError if one has its name."""
    first = loaded_runs[0]
    base_name = first.base.source.name
    if base_name in runs:
        raise UsageError(
            f"the run {runs[base_name]} has the name of its base, {base_name!r}",
            "another name",
            f"write NAME={runs[base_name]}",
        )
    return [make_served_model(base_name, first, BASE_ROW, max_length)] + [
        make_served_model(name, trained, trained.adapter_name, max_length, base_name)
        for name, trained in zip(runs, loaded_runs, strict=True)
    ]


def make_served_model(
    name: str, trained: TrainedModel, adapter_or_base: str, max_length: int, parent: str | None = None
) -> ServedModel:
    """Return the base (`BASE_ROW`), or an adapter of a loaded model, as requests name it."""
    tokenizer, model = trained.base.tokenizer, trained.model
    answering = make_generation_model(model, tokenizer, adapter_or_base)
    return ServedModel(
        name=name,
        adapter_or_base=answering.adapter_or_base,
        tokenizer=tokenizer,
        end_tokens=answering.end_tokens,
        max_length=min(max_length, answering.max_length or max_length),
        vocab_size=model.config.get_text_config().vocab_size,
        parent=parent,
        tool_calls=detect_json_tool_call_format(tokenizer),
    )
