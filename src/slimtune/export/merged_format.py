"""The folder that `slimtune merge` writes: a plain Hugging Face checkpoint of base and adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors import SafetensorError, safe_open

from ..core.foundation.dtype_names import llama_cpp_dtype_name
from ..core.foundation.files import read_json_object
from ..errors import ModelError, RunError, format_names
from .export_format import LICENCE_FILES, MERGED_FOLDER, TOKENIZER_FILES, ExportFormat
from .export_results import EngineVerdict, MergedExportFacts

if TYPE_CHECKING:
    from ..generation.inference_engines import InferenceEngine
    from .verify import ExportVerifier

ENGINE_NAME = "merged folder"
_PATH_IN_CARD = re.compile(r"`(?:~|\.{1,2})?/[^`\n]*?([^`/\n]+)/?`")
"""A local path in the card of a merged model; the group is its last part."""


@dataclass(frozen=True)
class MergedFormat(ExportFormat):
    """A Hugging Face checkpoint; `slimtune merge` writes it."""

    kind: ClassVar[str] = MERGED_FOLDER
    facts: ClassVar[type] = MergedExportFacts
    upload_kind: ClassVar[str] = "checkpoint"
    upload_marker: ClassVar[str] = r"config\.json"
    upload_files: ClassVar[str] = (
        rf"(config|generation_config)\.json|.+\.safetensors(\.index\.json)?|README\.md|{TOKENIZER_FILES}|{LICENCE_FILES}"
    )

    def verify_folder(self, verifier: ExportVerifier, folder: Path, facts: Any) -> EngineVerdict:
        """Compare the checkpoint with the trained adapter."""
        precision = llama_cpp_dtype_name(facts.comparison.dtype)
        return verifier.verify_engine(
            ENGINE_NAME, precision, lambda: verifier.open_merged(folder), are_chats_compared=True
        )

    def list_run_checks(self, verifier: ExportVerifier) -> list[Callable[[], EngineVerdict]]:
        """Return the comparison of the run, merged."""
        from .merge import merge

        folder = verifier.temp_folder / "merged"

        def open_merged() -> InferenceEngine:
            verifier.require_mergeable()
            merge(verifier.run, folder)
            return verifier.open_merged(folder)

        precision = llama_cpp_dtype_name(verifier.loaded.base.dtype)
        return [lambda: verifier.verify_engine(ENGINE_NAME, precision, open_merged, are_chats_compared=True)]

    def check_upload(self, folder: Path, files: dict[str, Path | bytes], notes: list[str]) -> str:
        """Raise ModelError if the checkpoint is damaged or incomplete; remove local paths from its card."""
        weights = {n: folder / n for n in files if n.endswith(".safetensors")}
        for index in (n for n in files if n.endswith(".index.json")):
            weight_map = read_checkpoint_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{folder / index} has no weight_map", "the index of a checkpoint", "merge it again")
            if missing := set(map(str, weight_map.values())) - set(weights):
                names = format_names(sorted(missing))
                raise ModelError(f"{folder} lacks {names}", "every file that its index names", "merge it again")
        if not weights:
            raise ModelError(f"{folder} has no *.safetensors", "a complete checkpoint", "save it with safetensors")
        for file in weights.values():
            try:
                with safe_open(str(file), framework="pt") as f:
                    f.keys()
            except SafetensorError as e:
                raise ModelError(f"{file} is damaged: {e}", "a complete file", "merge it again") from None
        if "README.md" in files:
            card = (folder / "README.md").read_text(encoding="utf-8")
            files["README.md"] = _PATH_IN_CARD.sub(r"`\1`", card).encode()
        if "auto_map" in read_checkpoint_json(folder / "config.json"):
            notes.append("config.json names code files (auto_map), which are not uploaded")
        return f"{folder.resolve().name}: a whole model"


def read_checkpoint_json(file: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file of a checkpoint; ModelError if it is damaged."""
    try:
        return read_json_object(file)
    except RunError as e:
        raise ModelError(e.message, "a complete checkpoint", "save it again") from None
