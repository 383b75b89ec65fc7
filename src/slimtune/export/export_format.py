"""What an export format is: one file, `export/NAME_format.py`, with the class `NameFormat`. Its fields are the options.

    @dataclass(frozen=True)
    class MyFormat(ExportFormat):
        kind: ClassVar[str] = "mine"
        system: str | None = field(default=None, metadata=flag("System prompt of every conversation."))

        def write(self, job): ...                       files into job.folder, facts, commands, notes
        def verify_folder(self, verifier, folder, facts): ...   a verdict of the engine that reads them

`slimtune export --to mine --system …` and `slimtune verify FOLDER` follow from it, and so do `slimtune push` and
`slimtune verify RUN`, if the class says what they need. A format's file imports torch only inside its methods: flags
and wrong options are answered without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.foundation.json_results import OMIT_NONE
from ..core.foundation.registry import Registry
from ..errors import UsageError, format_names, suggest

if TYPE_CHECKING:
    from ..core.models.model_source import ModelSource
    from ..core.training.trained_model import TrainedModel
    from .export_results import EngineVerdict
    from .verify import ExportVerifier


def make_flag_metadata(help: str, *names: str, parse: Callable[[str], Any] | None = None) -> Mapping[str, Any]:
    """Return the metadata of an option.

    Args:
        help: one sentence.
        names: of the flag; by default that of the option, with dashes.
        parse: makes the value of the flag's text; it raises a UsageError.
    """
    return {"help": help, "names": names, "parse": parse}


def _parse_rank_or_share(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise UsageError(f"--convert-to-lora {text!r} is neither a rank nor a share", "16, or 0.99") from None


MERGED = make_flag_metadata("Base and adapter as one model; for Ollama by default.", "--merged/--no-merged")
CONVERT_TO_LORA = make_flag_metadata(
    "Convert it to a LoRA first: of this rank (16), or keeping this share of the change (0.99).",
    parse=_parse_rank_or_share,
)
NAME = make_flag_metadata("Name of the model in the engine; by default the folder's.")
"""Options that several formats have."""


@dataclass(frozen=True)
class ExportJob:
    """What a format writes."""

    loaded: TrainedModel
    run: Path  # the run or adapter folder
    folder: Path  # to write into
    final_path: Path  # where the folder will be, for commands
    verify: bool  # whether the engine is asked afterwards


@dataclass(frozen=True)
class WrittenExport:
    """What a format has written."""

    facts: Any  # a dataclass; its keys are in the manifest and in the result
    commands: list[str]  # shell lines
    notes: list[str] = field(default_factory=list)  # one sentence each


@dataclass(frozen=True)
class LoraConversion:
    """How an adapter became a LoRA before it was exported."""

    method: str
    """The method of the trained adapter."""
    rank: int | None = field(default=None, metadata=OMIT_NONE)
    """The largest rank of the LoRA; for vLLM."""
    error: float = 0.0
    """What is lost, relative to the change, over all layers."""
    worst: float | None = field(default=None, metadata=OMIT_NONE)
    """What is lost in the worst layer; for vLLM."""


@dataclass(frozen=True)
class ExportFormat:
    """An export format. Its fields are its options; None: not given."""

    kind: ClassVar[str]
    facts: ClassVar[type]  # what it writes into the manifest, a dataclass whose fields have defaults
    upload_kind: ClassVar[str] = ""  # what `slimtune push` calls such a folder; "": it uploads none
    upload_marker: ClassVar[str] = ""  # a pattern; a folder with such a file can be uploaded as this format
    upload_files: ClassVar[str] = ""  # a pattern of the names of files that may be uploaded

    @property
    def is_merged(self) -> bool:
        """Whether base and adapter become one model."""
        return getattr(self, "merged", None) is True

    def resolve(self) -> ExportFormat:
        """Return the format with the options that were not given filled in; UsageError for impossible ones."""
        return self

    def require_base(self, base: ModelSource) -> None:
        """Raise unless a base can be exported with these options; before it is loaded."""

    def write(self, job: ExportJob) -> WrittenExport:
        """Write the files."""
        raise NotImplementedError

    def verify_folder(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict | None:
        """Compare what a folder contains, if anything, with the trained adapter; `facts` are those of its manifest."""
        raise NotImplementedError

    def list_run_checks(self, verifier: ExportVerifier) -> list[Callable[[], EngineVerdict]]:
        """Return what exports a run into a temporary folder and compares it, one function each. By default nothing."""
        return []

    def list_ways_to_keep_gain(self, run: Path) -> list[str]:
        """Return what to do if too little of the held-out gain is left, each with its command."""
        return ["more bits: --precision"]

    def hint_if_different(self) -> str:
        """Return what to do if the engine differs from the trained adapter."""
        hint = "please report it; --no-verify writes the folder without the check"
        if self.is_merged and getattr(self, "precision", "f32") != "f32":
            return f"--precision f32, which holds smaller changes; if it differs, too, {hint}"
        return hint

    def check_upload(self, folder: Path, files: dict[str, Path | bytes], notes: list[str]) -> str:
        """Raise if files cannot be uploaded, change them or add notes; return the first line of the commit."""
        raise NotImplementedError


TOKENIZER_FILES = (
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|"
    r"merges\.txt|spiece\.model|chat_template\.(jinja|json)|preprocessor_config\.json|processor_config\.json"
)
LICENCE_FILES = r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(md|txt))?"
"""Patterns of the names of files that may be uploaded beside weights."""
EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry("slimtune.export_formats", "export format")
MERGED_FOLDER = "merged"
"""The format that `slimtune merge` writes; no target of an export."""


def list_export_targets() -> tuple[str, ...]:
    """Return the names of the formats that `slimtune export` writes."""
    return tuple(name for name in EXPORT_FORMATS.names() if name != MERGED_FOLDER)


def require_known_export_target(target: str) -> None:
    """Raise UsageError unless it is a target of an export."""
    if target not in (targets := list_export_targets()):
        raise UsageError(f"unknown target {target!r}{suggest(target, targets)}", format_names(targets))


def make_export_format(target: str, options: Mapping[str, Any]) -> ExportFormat:
    """Return a format with options by name, those that were not given filled in.

    Raises:
        UsageError: there is no such target, it does not read an option, or the options are impossible.
    """
    require_known_export_target(target)
    kind = EXPORT_FORMATS.load(target)
    given = {name: value for name, value in options.items() if value is not None}
    known = {f.name for f in dataclasses.fields(kind)}
    if unread := [f"--{name.replace('_', '-')}" for name in given if name not in known]:
        raise UsageError(f"{', '.join(unread)} has no effect in an export to {target}", hint="leave it out")
    return kind(**given).resolve()
