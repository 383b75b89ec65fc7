"""The fields and methods every method's config has: PEFT's common fields and JSON form.

A config is a dataclass with PEFT's field names and defaults, so that existing PEFT code gives the same result. A field
that PEFT has and this library lacks is ignored at PEFT's default and refused by name at any other value.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ...errors import (
    AdapterError,
    ConfigError,
    PeftWarning,
    UnknownOrMissingFieldError,
    UsageError,
    format_names,
    suggest,
)
from ..foundation.files import read_json_object, write_atomic
from ..foundation.json_results import JsonObject
from ..foundation.registry import Registry
from ..foundation.version import __version__
from .architectures import DEFAULT_TARGETS, get_model_type
from .config_fields import DeclaredSettings, FieldError, config_field
from .method_registry import get_method_config_class, list_methods
from .name_patterns import get_value_by_pattern, make_config_error_if_bad_pattern

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .adapter_module import AdapterModule, AdapterSite, UndoableLayerReplication

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = f"0.21.2+slimtune.{__version__}"
"""`peft_version` of a new config: the release of PEFT whose format its files have, and the library that writes them."""
BIAS_HELP = "which biases of the base train too: none, all, or only those of adapted layers"
FAN_IN_FAN_OUT_HELP = "the base stores weights as (in, out); set automatically for Conv1D"
PEFT_SUBCLASSES: Registry[Callable[[Any, str], Any]] = Registry("slimtune.peft_subclasses", "library")

SiteKind = Literal["linear", "embedding", "conv", "weight", "norm", "parameters", "block", "attention", "model"]
"""Kinds of places in a model where an adapter module can go (`adapter_module.py`)."""


DataInitialization = Callable[[Any, Any, Sequence[Mapping[str, Any]]], None]
"""Initializes an adapter from data: gets the adapted model, the loaded base, with its tokenizer and `download_weights`
before quantization, and the training rows as tokenized examples."""


class TaskType(StrEnum):
    """What the model is tuned for (PEFT's names)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods by PEFT's names: `PeftType.LORA`."""

    _ignore_ = "name"
    for name in list_methods():
        locals()[name.upper()] = name.upper()


class _ConfigMeta(type):
    """Checks a config's keyword arguments; makes it an instance of `peft.PeftConfig` where peft is installed."""

    @property
    def __signature__(cls) -> Signature:
        """The fields, instead of the arguments of `__call__`."""
        full = signature(cls.__init__)  # type: ignore[misc]
        return full.replace(parameters=list(full.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        unsupported = getattr(cls, "unsupported_peft_fields", {})
        for name in [k for k in kwargs if k not in known]:
            value = kwargs.pop(name)
            if name in unsupported and value == unsupported[name]:
                continue
            full_name = cls.short_names.get(name)  # type: ignore[attr-defined]
            raise UnknownOrMissingFieldError(
                f"{cls.__name__} has no field {name!r} (given {value!r}){suggest(name, known)}",
                f"fields: {format_names(sorted(known), 40)}",
                f"use {full_name}" if full_name else "leave it out, or train this adapter with the library that has it",
            )
        return type.__call__(_make_peft_config_subclass(cls), *args, **kwargs)


@dataclass
class PeftConfig(DeclaredSettings, metaclass=_ConfigMeta):
    """The fields all methods share.

    A method's own config declares its fields with `config_field`; `find_conflicts` has the rules that involve several.
    """

    name: ClassVar[str] = ""
    """The method's name: the name of its folder or file."""
    prefix: ClassVar[str] = ""
    """How the names of the method's tensors start, if PEFT has such a prefix."""
    unsupported_peft_fields: ClassVar[dict[str, Any]] = {}
    """PEFT's fields that this library lacks, with PEFT's defaults: accepted at the default, refused at other values."""
    recipe_defaults: ClassVar[dict[str, Any]] = {}
    """Defaults of recipes and the command line that differ from PEFT's; a callable gets the other settings."""
    learning_rate: ClassVar[float] = 2e-4
    """The default learning rate of recipes; see `default_learning_rate`."""
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear",)
    """The kinds of site the method can change."""
    trains_every_weight: ClassVar[bool] = False
    """Whether the adapter has a trained copy of every weight of the base; weights that are tied there share one."""
    mergeable: ClassVar[bool] = True
    """Whether its adapter modules define `merge_into`, so that it can be exported as a merged model."""
    sums_parameters: ClassVar[bool] = False
    """Whether a weighted sum of adapters is one of this method, with the sums of their parameters, as in PEFT."""
    uses_lora_file_format: ClassVar[bool] = False
    """Whether vLLM and llama.cpp read its files as a LoRA."""
    fields_not_in_peft: ClassVar[frozenset[str]] = frozenset()
    """Fields that PEFT's config of the method lacks: left out of the file at their default."""
    exists_in_peft: ClassVar[bool] = True
    """Whether PEFT has the method, so that a model card may say so."""
    is_prompt_learning: ClassVar[bool] = False
    """Whether the method puts learned positions in front of the sequence."""
    is_adaption_prompt: ClassVar[bool] = False
    """Whether the method is PEFT's LLaMA-Adapter."""
    training_written_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that training writes: two adapters with the same settings may differ in them."""

    task_type: str | TaskType | None = config_field(
        None, "what the model is tuned for; None leaves the model as it is", choices=tuple(TaskType), kw_only=True
    )
    peft_type: str | PeftType | None = dataclasses.field(default=None, kw_only=True)  # set below to the method's
    base_model_name_or_path: str | None = dataclasses.field(default=None, kw_only=True)
    revision: str | None = dataclasses.field(default=None, kw_only=True)
    inference_mode: bool = config_field(False, "attach the adapter frozen", in_recipe=False, kw_only=True)
    auto_mapping: dict | None = dataclasses.field(default=None, kw_only=True)
    peft_version: str | None = dataclasses.field(default=None, kw_only=True)  # set below to the version that writes it

    def __post_init__(self) -> None:
        self.peft_version = self.peft_version or _describe_version()
        if self.task_type is not None and self.task_type not in [*TaskType]:
            tasks = ", ".join(TaskType)
            message = f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {tasks}."
            raise ConfigError(message + suggest(str(self.task_type), TaskType))
        if self.name:
            peft_name = self.name.upper()
            self.peft_type = PeftType.__members__.get(peft_name, peft_name)  # a test's own method is no member
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | os.PathLike | None):
                raise self.error(name, "a string or None").to_exception()
        self.check_fields()
        if self.task_type is not None:
            self.task_type = str(TaskType(self.task_type))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(names := getattr(self, name, None), list):
                setattr(self, name, set(names))  # as in PEFT

    @classmethod
    def is_exported(cls) -> bool:
        """Return whether engines can serve the adapter: merged into the base, or as a LoRA."""
        return cls.mergeable or cls.uses_lora_file_format

    def __reduce__(self) -> tuple[Any, ...]:
        # The class that its module knows by name: pickle cannot find the one registered with peft.
        declared = next(c for c in type(self).__mro__ if "_joined" not in vars(c))
        return _new_config, (declared,), dict(vars(self))

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise a ConfigError about field `name` unless the condition holds."""
        if not condition:
            raise self.error(name, expected).to_exception()

    # --- what a method adds: it defines `build`, and those of the others that it needs ------------------------------

    @property
    def copies_in_fp32(self) -> bool:
        """Whether trained copies of 16-bit weights are in fp32."""
        return True

    def check_model(self, model: nn.Module) -> None:
        """Raise UsageError if the method cannot adapt this model; called before the adapter is attached."""

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Raise UsageError if training on these rows, dicts with `input_ids`, would change nothing."""

    def fill_from_model(self, model: nn.Module) -> None:
        """Fill in the fields that depend on the model, such as sizes; called when the adapter is attached."""

    def change_base(self, model: nn.Module) -> UndoableLayerReplication | None:
        """Change the base's modules before the first adapter is attached; return how to undo it, None without one."""
        return None

    def default_targets(self, model: nn.Module) -> list[str] | None:
        """Return the names of the modules to change if no target is given; None: the method has no default."""
        return None

    def extra_targets(self, model: nn.Module) -> dict[str, SiteKind]:
        """Return the full names, with the kind of site, of modules that the method changes besides its targets."""
        return {}

    def build(self, site: AdapterSite) -> AdapterModule:
        """Return the adapter module for `site`. A method defines this."""
        raise ConfigError(f"{type(self).__name__} belongs to no method", "a method's config, such as LoraConfig")

    def build_all(self, sites: Sequence[AdapterSite]) -> list[AdapterModule]:
        """Return the adapter modules for all sites. A method whose modules share tensors overrides this."""
        return [self.build(site) for site in sites]

    def max_added_bytes(self, adapter_modules: Mapping[str, AdapterModule]) -> int | None:
        """Return how many bytes training, or an initialization from data, can add to the adapter's tensors at most.

        `adapter_modules` are the adapter modules by site name. None: shapes stay fixed; 0: tensors can only shrink.
        """
        return None

    def file_key(self, key: str) -> str:
        """Return a tensor's key in PEFT's file; `key` is the usual one, `base_model.model.<site>.<name>`."""
        return key

    def default_learning_rate(self, steps: int, epochs: float, hidden_size: int) -> float:
        """Return the learning rate of a run that has none.

        Args:
            steps: optimizer steps of the run.
            epochs: how often a row comes, at least 1.
            hidden_size: width of the base's hidden states.
        """
        return self.learning_rate

    def convert_to_zero_init(
        self, adapter_modules: Mapping[str, AdapterModule]
    ) -> tuple[PeftConfig, dict[str, dict[str, Tensor]]]:
        """Return the config, and the tensors by site, of an equal adapter that stores no start."""
        message = f"{type(self).__name__} has no start that a conversion could take out"
        raise UsageError(message, "a LoRA with init_lora_weights 'pissa', 'olora', 'corda' or 'lora_ga'")

    @property
    def compensates_quantization(self) -> bool:
        """Whether the adapter starts from the error of the base's quantization: then it fits that base alone."""
        return False

    def defer_initialization(self) -> DataInitialization | None:
        """Return the function that a run initializes the adapter with once it is attached; None: there is none.

        Changes the config so that attaching it needs neither rows nor the weights before quantization.
        """
        return None

    def on_train_begin(self, total_steps: int) -> None:
        """Fill in the fields that depend on the number of optimizer steps; called before the first step."""

    def on_step_end(self, adapter_modules: Mapping[str, AdapterModule], step: int) -> None:
        """Update the method's own state after optimizer step `step`, from 1; the gradients still exist."""

    def find_untrained_experts(self, adapter_modules: Mapping[str, AdapterModule]) -> dict[str, list[int]]:
        """Return the experts whose part of the adapter got no gradient in the training so far, by parameter."""
        return {}

    def regularization_loss(self, adapter_modules: Mapping[str, AdapterModule]) -> Tensor | None:
        """Return a term to add to the training loss; None: nothing."""
        return None

    # --- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> JsonObject:
        """Return the fields as PEFT writes them, as plain JSON values."""
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in dataclasses.asdict(self).items()}
        values.pop("runtime_config", None)
        for field in dataclasses.fields(self):
            if field.name in self.fields_not_in_peft and values[field.name] == field.default:
                del values[field.name]
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, **_: Any) -> None:
        """Write `adapter_config.json` into the folder."""
        folder = require_folder_to_save_to(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter_config(folder, self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the config a PEFT JSON object describes: the class is found by its `peft_type`."""
        peft_type = values.get("peft_type") or cls.name
        if not peft_type:
            raise ConfigError("the config has no peft_type", "an adapter_config.json with a peft_type")
        method_class = get_method_config_class(getattr(peft_type, "value", peft_type))
        known = {f.name for f in dataclasses.fields(method_class)} | set(method_class.unsupported_peft_fields)
        # Newer versions of PEFT write fields that are unknown here: empty ones change nothing.
        return method_class(**{k: v for k, v in values.items() if k in known or v})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """Return the config of the method `peft_type` (none given: of this class) with these fields."""
        return cls.from_dict(kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **_: Any) -> JsonObject:
        """Return the fields in a JSON file, without `runtime_config`, which belongs to one run."""
        values = read_json_object(Path(path_json_file), error_class=AdapterError)
        if values.pop("runtime_config", None) is not None:
            warnings.warn(f"{path_json_file} has a `runtime_config`, which is ignored.", PeftWarning, stacklevel=2)
        return values

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the fields of a file as `from_pretrained` passes them on."""
        return kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Read the config of an adapter folder or Hub repository.

        Raises:
            UsageError: there is no such folder, repository or file.
            UnknownOrMissingFieldError: the file has no peft_type.
            AdapterError: it is invalid, its method is unknown, or an unsupported field is not at its default.
        """
        file = get_or_download_file(pretrained_model_name_or_path, CONFIG_FILE, subfolder, **hub)
        values = cls.from_json_file(file)
        if not values.get("peft_type"):
            text = f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            raise UnknownOrMissingFieldError(text, "an adapter_config.json", f"look into {file}")
        try:
            return cls.from_dict(cls.check_kwargs(**values))
        except ConfigError as e:
            raise AdapterError(f"{file}: {e.message}", e.expected, e.hint) from None


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Return the config that a dictionary with a `peft_type` describes."""
    return PeftConfig.from_dict(config_dict)


def _describe_version() -> str:
    """Return FORMAT_VERSION, and the commit if it is a development version."""
    if ".dev" not in FORMAT_VERSION:
        return FORMAT_VERSION
    commit = None
    try:
        commit = _get_commit_hash(__package__.partition(".")[0])
    except Exception as e:  # a broken installation must not keep anybody from training
        warnings.warn(f"the commit of {FORMAT_VERSION} could not be found: {e}", PeftWarning, stacklevel=4)
    return f"{FORMAT_VERSION}@{commit or 'UNKNOWN'}"


@cache
def _get_commit_hash(pkg_name: str) -> str | None:
    """Return the commit that a package was installed from, None if it was installed in another way."""
    try:
        source = distribution(pkg_name).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(source or "{}").get("vcs_info", {}).get("commit_id")


def _make_peft_config_subclass(cls: Any) -> Any:
    """Return the class or a subclass that other libraries recognise as a `peft.PeftConfig`."""
    return PEFT_SUBCLASSES.load("peft")(cls, "PeftConfig")


def _new_config(cls: type[PeftConfig]) -> PeftConfig:
    return object.__new__(_make_peft_config_subclass(cls))


@dataclass
class TargetedConfig(PeftConfig):
    """The fields of methods that change chosen layers."""

    architecture_targets: ClassVar[Mapping[str | None, list[str]]] = DEFAULT_TARGETS
    """The default targets by `model_type`: PEFT's for LoRA, unless a method has its own."""

    target_modules: list[str] | str | None = config_field(
        None,
        'names or dotted suffixes of modules, a regular expression for the full name (a string), or "all-linear": '
        "every linear layer, and with LoRA the experts, except the output head and routers; None: PEFT's choice for "
        "the architecture",
    )
    exclude_modules: list[str] | str | None = config_field(
        None, "names, suffixes or a regular expression of modules to leave out of target_modules"
    )
    layers_to_transform: list[int] | int | None = config_field(
        None, "index or indexes, from 0, of the layers to change; None: all", ge=0
    )
    layers_pattern: list[str] | str | None = config_field(
        None, "name of the list that holds the layers, where a model has several numbered lists"
    )
    modules_to_save: list[str] | None = config_field(
        None, "modules trained in full beside the adapter (a new head) and saved with it"
    )

    def default_targets(self, model: nn.Module) -> list[str] | None:
        return self.architecture_targets.get(get_model_type(model))

    def find_conflicts(self) -> Iterator[FieldError]:
        yield from super().find_conflicts()
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    message = f"`{name}` cannot be used when `target_modules` is a str."
                    hint = "put the layer numbers into the regular expression"
                    yield FieldError(name, message, f"{name}=None", hint)
        fields = {n: getattr(self, n) for n in ("target_modules", "exclude_modules")}
        texts = {n: [text] for n, text in fields.items() if isinstance(text, str) and text != "all-linear"}
        layers = self.layers_pattern or []
        texts |= {"layers_pattern": [layers] if isinstance(layers, str) else layers}
        for name, patterns in {**texts, **getattr(self, "patterns", {})}.items():
            for pattern in patterns:
                if (error := make_config_error_if_bad_pattern(pattern)) is not None:
                    sentence = f"{name}: {error.message}"
                    yield FieldError(name, error.message, error.expected, error.hint, sentence)
        if self.layers_pattern and self.layers_to_transform is None:
            message = "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            yield FieldError("layers_pattern", message)


@dataclass
class RankPatternConfig(TargetedConfig):
    """The fields of methods with a rank `r` and an alpha that can differ by layer."""

    alpha_name: ClassVar[str] = "alpha"
    """The field that holds the alpha of layers that no pattern matches."""

    rank_pattern: dict[str, int] = config_field(
        {}, "rank of single layers, by their name or pattern", ge=1, kw_only=True
    )
    alpha_pattern: dict[str, float] = config_field(
        {}, "alpha of single layers, by their name or pattern", gt=0, kw_only=True
    )

    @property
    def patterns(self) -> dict[str, dict]:
        """The fields that map layer patterns to values; each pattern must match a target."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def get_rank(self, layer_name: str) -> int:
        return get_value_by_pattern(self.rank_pattern, layer_name, getattr(self, "r"))  # noqa: B009 (a method's own field)

    def get_alpha(self, layer_name: str) -> float:
        return get_value_by_pattern(self.alpha_pattern, layer_name, getattr(self, self.alpha_name))


def require_folder_to_save_to(save_directory: str | os.PathLike) -> Path:
    """Return the path of a folder; raise UsageError for an empty one, which would be the working folder."""
    if not save_directory:
        raise UsageError(f"save_directory is {save_directory!r}", "a folder", "'.' is the one you are in")
    return Path(save_directory)


def write_adapter_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write a config's values as the `adapter_config.json` of a folder."""
    write_atomic(folder / CONFIG_FILE, format_adapter_config(values))


def format_adapter_config(values: Mapping[str, Any]) -> str:
    """Return the text of an `adapter_config.json`."""
    return json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"


def get_or_download_file(path: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the local path of a file in an adapter's or run's folder, or in a Hub repository (which downloads it).

    Raises:
        UsageError: the path is neither a folder with the file nor a reachable repository.
    """
    folder = Path(path, subfolder or "")
    if folder.is_dir():
        # A run's folder has its adapter in a subfolder.
        if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
            folder = folder / "adapter"
        if (folder / name).is_file():
            return folder / name
        names = format_names(sorted(p.name for p in folder.iterdir()))
        raise UsageError(f"{folder} has no {name}; it has {names}", "an adapter folder as save_pretrained writes it")
    text = str(path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UsageError(f"there is no folder {text!r}{suggest(folder.name, siblings)}", f"a folder with {name}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(text, name, subfolder=subfolder, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        message = f"{text!r} is not a folder, and downloading {name} from the Hub failed: {type(e).__name__}"
        hint = "check the name; log in for a private repository; without a network give a local folder"
        raise UsageError(message, f"an adapter folder or a Hub repository with {name}", hint) from e
