"""Which stage between the trainer and the engine differs: `slimtune verify RUN --stages`.

    saved file   the adapter that the trainer kept (its checkpoint, its validation loss)  →  the file in adapter/
    reloaded     →  as PEFT reads the file
    merged       →  base and adapter as one checkpoint
    quantized    →  its GGUF, dequantized
    engine       →  llama.cpp on the GGUF; mlx-lm on the merged checkpoint; a server, if it is given

Each stage is compared with the one before it, by log-probabilities of the same tokens, and may differ by what its own
precision explains: the untouched base goes through the same rounding and the same engine. So a fault is named where it
comes in, and is not hidden by the rounding of a later stage.
"""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.data.chat_template import TokenizedRow
from ..core.data.tokenized_dataset import IGNORE_INDEX
from ..core.foundation.dtype_names import llama_cpp_dtype_name
from ..core.foundation.files import read_json_object
from ..core.models.load_errors import silencing_model_loading
from ..core.training.checkpoint import PREFIX, load_method_state
from ..core.training.datasets import tokenize_recipe_datasets
from ..core.training.resuming import load_checkpoint_adapter_weights
from ..core.training.run_dir import ADAPTER_FILE, RunDir
from ..errors import ModelError, SlimtuneError
from ..extras.adapter_strength import AdapterTensorInterpolator
from ..extras.gguf_loading import load_gguf
from ..generation.inference_engines import TextTokenScores, TransformersInferenceEngine
from ..generation.mlx_engine import MlxEngine, is_mlx_lm_installed
from .expected_logps import (
    TOLERANCES,
    AdapterReference,
    EngineTolerance,
    get_loosest_tolerance,
    judge_engine_against_adapter,
)
from .export_results import EngineVerdict
from .kept_gain import sum_supervised_nats
from .llama_cpp_tools import resolve_gguf_precision
from .merge import merge, write_merged_gguf
from .mlx import find_mlx_precision_and_tolerance, open_mlx_base_like
from .served_base import read_gguf_majority_precision
from .served_place import ServedPlace, verify_place
from .verify import ExportVerifier

SAVED_FILE, RELOADED, MERGED = "saved file", "reloaded by PEFT", "merged folder"
SAME_ARITHMETIC = EngineTolerance(1e-3, 1e-4)
"""Of a stage that computes the same numbers in the same dtype."""
ENGINE_ARITHMETIC = EngineTolerance(0.02, 0.005, follows_base=True)
"""Of an engine on the weights that the stage before had, dequantized; widened to twice what the base differs by."""
LOSS_TOLERANCE, ROUNDED_LOSS_TOLERANCE = 1e-3, 0.02
"""How far the saved file's validation loss may be from the recorded one, nats per token; below 32 bits the second."""
MOST_VALIDATION_TOKENS = 20_000
_FIELDS_OF_A_PLACE = ("base_model_name_or_path", "inference_mode", "revision")


@dataclass(frozen=True)
class StageFiles:
    """What takes the place of what a stage writes."""

    merged: Path | None = None  # a checkpoint of base and adapter
    gguf: Path | None = None  # a whole model
    precision: str = "q8_0"  # of the GGUF
    place: ServedPlace | None = None  # the engine


class RecordedEngine:
    """An engine whose log-probabilities are kept, by the text."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name = engine, engine.name
        self.scores: dict[tuple[int, ...], TextTokenScores] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def score(self, ids: Sequence[int]) -> TextTokenScores:
        """Return what the engine gives for a text, asked once."""
        if (key := tuple(ids)) not in self.scores:
            self.scores[key] = self.engine.score(ids)
        return self.scores[key]

    def list_log_probs(self, reference: AdapterReference) -> list[Tensor]:
        """Return the log-probabilities of a reference's texts."""
        return [self.score(text.prompt_and_answer_ids).token_log_probs for text in reference.texts]


@dataclass(frozen=True)
class QuantizedStage:
    """What the stages after the quantized one need of it."""

    file: Path
    base_file: Path  # the untouched base in the same precision
    base: RecordedEngine  # that file, dequantized
    base_log_probs: list[Tensor]


def verify_stages(verifier: ExportVerifier, files: StageFiles) -> tuple[list[EngineVerdict], str | None]:
    """Compare each stage of a run with the one before, up to the first that differs.

    Returns:
        the verdicts in order, and the name of the stage that differs; None: none does.
    """
    chain, checks = _StageChain(verifier, files), list[EngineVerdict]()
    for verify_stage in chain.list_stages():
        checks.append(verify_stage())
        if checks[-1].passed is False:
            return checks, checks[-1].engine
    return checks, None


class _StageChain:
    """The stages of a run; each leaves its log-probabilities to the next."""

    def __init__(self, verifier: ExportVerifier, files: StageFiles) -> None:
        self.verifier, self.files = verifier, files
        self.trained = self.expected = verifier.reference  # `expected`: what the stage before computes
        self.merged = files.merged or verifier.temp_folder / "stage-merged"
        self.gguf: QuantizedStage | None = None

    def list_stages(self) -> list[Callable[[], EngineVerdict]]:
        """Return what compares each stage, in order."""
        place, stages = self.files.place, [self.verify_saved_file, self.verify_reloaded, self.verify_merged]
        if is_mlx_lm_installed():
            stages.append(self.verify_mlx)  # it reads the merged checkpoint
        if place is None or self.files.gguf is not None:
            stages.append(self.verify_quantized)
        return [*stages, self.verify_llama_cpp if place is None else lambda: verify_place(self.verifier, place)]

    def compare(
        self, name: str, precision: str, open_engine: Any, tolerance: EngineTolerance | None, open_base: Any = None,
        *, are_chats_compared: bool = False, is_next_expected: bool = True,
    ) -> EngineVerdict:  # fmt: skip
        """Compare a stage with the one before; what it computes is then what the next stage should."""
        opened: list[RecordedEngine] = []

        def open_recorded() -> Any:
            opened.append(RecordedEngine(open_engine()))
            return opened[0]

        verifier = replace(self.verifier, reference=self.expected)
        verdict = verifier.verify_engine(
            name, precision, open_recorded, tolerance, open_base, are_chats_compared=are_chats_compared
        )
        if verdict.passed is not False and verdict.positions and is_next_expected:
            self.expected = self.expected.expecting(opened[0].list_log_probs(self.expected))
        return verdict

    # --- the trainer and its file -------------------------------------------------------------------------------------

    def verify_saved_file(self) -> EngineVerdict:
        """Compare the run's adapter file with the checkpoint that the trainer kept, and with the loss it measured."""
        name, run, model = SAVED_FILE, RunDir(self.verifier.run), self.verifier.model
        if not run.result_file.is_file():
            return EngineVerdict(name, "f32", reason=f"{run.path} has no record of its trainer (result.json)")
        result = read_json_object(run.result_file)
        folder = run.checkpoints / f"{PREFIX}{result.get('best_step')}"
        engine = TransformersInferenceEngine(name, model, self.verifier.loaded.base.tokenizer)
        verdict = EngineVerdict(name, "f32", reason="the trainer's checkpoint is gone, and no validation loss is known")
        if (folder / ADAPTER_FILE).is_file():
            kept = self.trained.log_probs  # of the file
            strength = (result.get("forgetting") or {}).get("strength", 1.0)
            load_checkpoint_adapter_weights(model, folder)
            try:
                if strength != 1:
                    load_method_state(folder, model)
                    AdapterTensorInterpolator(model, self.verifier.loaded.adapter_name).set(strength)
                trainers = self.trained.score(engine, "texts for the trainer's checkpoint")
            finally:
                load_checkpoint_adapter_weights(model, self.verifier.loaded.adapter_folder)
            assert kept is self.trained.log_probs
            verdict = judge_engine_against_adapter(self.trained.expecting(trainers), engine, "f32", SAME_ARITHMETIC)
            if changed := _list_changed_config_fields(folder, self.verifier.loaded.adapter_folder):
                reason = f"adapter_config.json has another {', '.join(changed)} than the trainer's checkpoint"
                verdict = replace(verdict, passed=False, reason="; ".join(filter(None, (reason, verdict.reason))))
        if verdict.passed is not False and result.get("validation_loss") is not None:
            verdict = self._compare_validation_loss(verdict, result["validation_loss"], engine)
        return verdict

    def _compare_validation_loss(
        self, verdict: EngineVerdict, recorded: float, engine: TransformersInferenceEngine
    ) -> EngineVerdict:
        """Return the verdict with the validation loss of the saved file beside the one that the trainer measured."""
        loaded = self.verifier.loaded
        if loaded.recipe is None or loaded.recipe.task.name != "sft":
            return verdict
        try:
            found = tokenize_recipe_datasets(loaded.recipe, loaded.base.tokenizer).validation
        except SlimtuneError:  # the rows are gone
            return verdict
        rows = [TokenizedRow(e["input_ids"], [label != IGNORE_INDEX for label in e["labels"]]) for e in found]
        tokens = sum(sum(row.supervised[1:]) for row in rows)
        if not 0 < tokens <= MOST_VALIDATION_TOKENS:
            return verdict
        loss = sum(sum_supervised_nats(engine, rows, "validation rows")) / tokens
        is_exact = loaded.base.quantization is None and loaded.base.dtype.itemsize >= 4
        allowed = LOSS_TOLERANCE if is_exact else ROUNDED_LOSS_TOLERANCE
        if abs(loss - recorded) <= allowed:
            return replace(verdict, passed=True, cause="applied", reason="") if verdict.passed is None else verdict
        reason = f"its validation loss is {loss:.4f}, the trainer measured {recorded:.4f} ({allowed:g} are allowed)"
        return replace(verdict, passed=False, reason="; ".join(filter(None, (reason, verdict.reason))))

    def verify_reloaded(self) -> EngineVerdict:
        """Compare what PEFT, or without it slimtune, reads from the file."""
        verifier = self.verifier
        folder = verifier.loaded.adapter_folder
        if importlib.util.find_spec("peft") is None or verifier.loaded.base.quantization is not None:
            return self.compare("reloaded", "f32", lambda: verifier.open_adapter(folder), SAME_ARITHMETIC)
        return self.compare(RELOADED, "f32", lambda: verifier.open_in_peft(folder), SAME_ARITHMETIC)

    # --- the whole model ----------------------------------------------------------------------------------------------

    def verify_merged(self) -> EngineVerdict:
        """Compare the merged checkpoint."""
        precision, tolerance = llama_cpp_dtype_name(self.verifier.loaded.base.dtype), None
        if self.files.merged is not None:
            precision, tolerance = find_mlx_precision_and_tolerance(self.files.merged)

        def open_merged() -> Any:
            if self.files.merged is None:
                self.verifier.require_mergeable()
                merge(self.verifier.run, self.merged)
            return self.verifier.open_merged(self.merged)

        return self.compare(MERGED, precision, open_merged, tolerance, are_chats_compared=True)

    def verify_mlx(self) -> EngineVerdict:
        """Compare mlx-lm on the merged checkpoint."""
        return self.compare(
            "mlx-lm", "f32", lambda: MlxEngine(self.merged), TOLERANCES["f32"],
            lambda _: open_mlx_base_like(self.verifier, self.merged), is_next_expected=False,
        )  # fmt: skip

    def verify_quantized(self) -> EngineVerdict:
        """Compare the GGUF's weights, dequantized."""
        verifier, precision = self.verifier, resolve_gguf_precision(self.files.precision)

        def open_quantized() -> Any:
            file, base_file = self.files.gguf or verifier.temp_folder / "stage.gguf", verifier.write_base_in(precision)
            if self.files.gguf is None:
                verifier.log(f"writing a GGUF in {precision}")
                write_merged_gguf(verifier.loaded, verifier.run, file, precision)
            with closing(RecordedEngine(_open_dequantized(base_file))) as base:
                log_probs = base.list_log_probs(self.expected)
            self.gguf = QuantizedStage(file, base_file, base, log_probs)
            return _open_dequantized(file)

        verdict = self.compare(
            f"quantized, {precision}", precision, open_quantized, None, lambda _: self.get_quantized().base,
            are_chats_compared=True,
        )  # fmt: skip
        if self.gguf is not None:
            self.expected = self.expected.expecting(self.expected.log_probs, self.gguf.base_log_probs)
            if (stored := read_gguf_majority_precision(self.gguf.file)) != precision and verdict.reason:
                verdict = replace(verdict, reason=f"its weights are mostly {stored}; {verdict.reason}")
        return verdict

    def get_quantized(self) -> QuantizedStage:
        """Return what the quantized stage left; ModelError if it could not be made."""
        if self.gguf is None:
            raise ModelError("there is no GGUF", "the stage before")
        return self.gguf

    def verify_llama_cpp(self) -> EngineVerdict:
        """Compare llama.cpp, which also rounds what it multiplies few bits with, with what its file's weights give."""
        base_difference = get_loosest_tolerance(self.files.precision).base_difference
        tolerance = replace(ENGINE_ARITHMETIC, base_difference=base_difference)
        return self.compare(
            "llama.cpp", self.files.precision, lambda: self.verifier.open_llama_cpp(self.get_quantized().file),
            tolerance, lambda _: self.verifier.open_llama_cpp(self.get_quantized().base_file),
            are_chats_compared=True,
        )  # fmt: skip


def _open_dequantized(file: Path) -> TransformersInferenceEngine:
    with silencing_model_loading():
        model, tokenizer = load_gguf(file)
    return TransformersInferenceEngine(file.name, model.eval(), tokenizer)


def _list_changed_config_fields(before: Path, after: Path) -> list[str]:
    """Return the fields of two adapter configs that differ, without those that only name a place."""
    one, other = (read_json_object(folder / "adapter_config.json") for folder in (before, after))
    names = (one.keys() | other.keys()) - {*_FIELDS_OF_A_PLACE}
    return sorted(name for name in names if one.get(name) != other.get(name))
