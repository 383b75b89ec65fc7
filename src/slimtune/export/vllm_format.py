"""The export for vLLM: the adapter's two files as it reads them, and serve.sh."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.json_results import OMIT_NONE
from ..errors import UsageError
from .export_format import (
    CONVERT_TO_LORA,
    MERGED,
    NAME,
    ExportFormat,
    ExportJob,
    LoraConversion,
    WrittenExport,
    make_flag_metadata,
)
from .export_results import EngineVerdict

if TYPE_CHECKING:
    from .verify import ExportVerifier


@dataclass(frozen=True)
class VllmExportFacts:
    """What the manifest of an export for vLLM says beside the run."""

    name: str | None = None
    """Of the adapter in requests."""
    base: str = ""
    """Path or Hub id of the base."""
    base_name: str = ""
    """Of the base in requests."""
    dtype: str | None = None
    """What vLLM computes in."""
    precision: str = "f32"
    """Of the adapter's files."""
    rank: int = 0
    """The largest rank of a layer."""
    max_lora_rank: int = 0
    """Of vLLM's flag --max-lora-rank."""
    modules: int = 0
    """Layers with an adapter."""
    folded: bool = False
    """Whether scales were multiplied into B."""
    bytes: int = 0
    """Of the adapter's files."""
    arguments: list[str] = field(default_factory=list)
    """What follows `vllm serve`."""
    conversion: LoraConversion | None = field(default=None, metadata=OMIT_NONE)
    """How the adapter became a LoRA; absent if it is one."""


@dataclass(frozen=True)
class VllmFormat(ExportFormat):
    """A LoRA that vLLM serves beside the base."""

    kind: ClassVar[str] = "vllm"
    facts: ClassVar[type] = VllmExportFacts

    merged: bool | None = field(default=None, metadata=MERGED)
    convert_to_lora: float | None = field(default=None, metadata=CONVERT_TO_LORA)
    name: str | None = field(default=None, metadata=NAME)
    dtype: str | None = field(
        default=None, metadata=make_flag_metadata("What vLLM computes in: float32, bfloat16, float16.")
    )

    def resolve(self) -> VllmFormat:
        """Return the format; UsageError for a merged model, which vLLM reads as a plain folder."""
        if self.merged:
            raise UsageError("vLLM reads a merged model as a plain folder", hint="slimtune merge RUN --out FOLDER")
        return self

    def write(self, job: ExportJob) -> WrittenExport:
        """Write the adapter's files, serve.sh, and the chat template if it is not the base's own."""
        from .vllm import write_vllm_adapter

        lora, name, dtype = self.convert_to_lora, self.name, self.dtype
        return write_vllm_adapter(
            job.loaded, job.run, job.folder, final_path=job.final_path, name=name, convert_to_lora=lora, dtype=dtype
        )

    def verify_folder(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict:
        """Read the adapter back and compare it with the trained one; vLLM itself is asked by its address."""
        from .verify import find_nearest_lora_error_tolerance

        verdict = verifier.verify_engine(
            "adapter folder, read back",
            "f32",
            lambda: verifier.open_adapter(folder, is_converted=facts.conversion is not None),
            find_nearest_lora_error_tolerance(facts),
        )
        return verifier.note_quantized_base(verdict)
