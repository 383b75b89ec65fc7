"""The export for Ollama: a GGUF and a Modelfile. Ollama from 0.34.1 on creates no model from an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.json_results import OMIT_NONE
from ..errors import UsageError
from .export_format import NAME, ExportJob, WrittenExport, make_flag_metadata
from .gguf_format import ADAPTER_GGUF, MODEL_GGUF, GgufExportFacts, GgufFormat

if TYPE_CHECKING:
    from ..core.models.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class OllamaExportFacts(GgufExportFacts):
    """What the manifest of an export for Ollama says beside the run."""

    template: bool = False
    """Whether the Modelfile has a TEMPLATE of its own."""
    stops: list[str] = field(default_factory=list)
    """The stop tokens."""
    num_ctx: int = 0
    """Tokens of the window."""
    ollama_base: str | None = field(default=None, metadata=OMIT_NONE)
    """Ollama's FROM, where it was given."""


@dataclass(frozen=True)
class OllamaFormat(GgufFormat):
    """What Ollama builds a model from: merged by default, unless an option is of an adapter."""

    kind: ClassVar[str] = "ollama"
    facts: ClassVar[type] = OllamaExportFacts

    ollama_base: str | None = field(
        default=None, metadata=make_flag_metadata("Ollama's FROM: a name from its library (llama3.1:8b), or a GGUF.")
    )
    name: str | None = field(default=None, metadata=NAME)
    system: str | None = field(
        default=None, metadata=make_flag_metadata("System prompt of every conversation in Ollama.")
    )
    num_ctx: int | None = field(default=None, metadata=make_flag_metadata("Tokens of Ollama's window."))

    def resolve(self) -> OllamaFormat:
        """Return the format, merged unless an option is of an adapter; UsageError for impossible options."""
        if self.merged and self.ollama_base is not None:
            raise UsageError("--merged and --ollama-base together", "one of them: a merged model contains its base")
        is_merged = self.merged
        if is_merged is None:
            is_merged = self.ollama_base is None and self.convert_to_lora is None
        resolved: Any = GgufFormat.resolve(replace(self, merged=is_merged))
        return resolved

    def require_base(self, base: ModelSource) -> None:
        """Raise unless Ollama can read base and adapter: a GGUF of both, or of the base."""
        super().require_base(base)
        if not self.merged and self.ollama_base is None and base.kind != "gguf":
            raise UsageError(
                f"the base {base.spec} is not a GGUF, which Ollama needs to add an adapter to",
                "a name from Ollama's library, or a GGUF of the same base",
                "leave --no-merged out: llama.cpp's converter makes one GGUF of base and adapter; for an Ollama before "
                "0.34.1 also --ollama-base NAME (such as llama3.1:8b)",
                code="llama-cpp-tools",
            )

    def write(self, job: ExportJob) -> WrittenExport:
        """Write the GGUF and the Modelfile."""
        from .ollama import require_base_path_unless_registry_name, write_modelfile
        from .served_base import resolve_matching_ollama_base

        gguf = super().write(job)
        loaded = job.loaded
        model: Any = loaded.model
        written = write_modelfile(
            job.folder,
            base_name_or_path=str(job.folder / MODEL_GGUF)
            if self.merged
            else self.ollama_base or loaded.base.source.path,
            adapter_gguf=None if self.merged else job.folder / ADAPTER_GGUF,
            tokenizer=loaded.base.tokenizer,
            config=model.config,
            name=self.name or job.final_path.resolve().name.lower(),
            system=self.system,
            max_seq_len=loaded.recipe.data.max_seq_len if loaded.recipe is not None else None,
            num_ctx=self.num_ctx,
            final_path=job.final_path,
        )
        notes, base = [*gguf.notes, *written.notes], None
        if not self.ollama_base and not self.merged and loaded.base.quantization is None:
            notes.append(
                "the adapter was trained on this base in 16 or 32 bits; Ollama adds it to the base as the file has it"
            )
        if (given := self.ollama_base) is not None:
            path = require_base_path_unless_registry_name(given)
            if not job.verify:  # the check compares them, too
                resolve_matching_ollama_base(given, loaded)
            base = given if path is None else str(path.resolve())
        facts = OllamaExportFacts(
            **vars(gguf.facts),
            template=written.template is not None,
            stops=written.stops,
            num_ctx=written.num_ctx,
            ollama_base=base,
        )
        return WrittenExport(facts, written.commands, notes)
