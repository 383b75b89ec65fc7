"""`slimtune methods`: what can be trained, and each method's fields, read from the methods' config classes."""

import inspect
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ..core.foundation.formatting import compute_trained_share, format_bytes, format_count
from ..core.foundation.json_results import INLINE, OMIT_NONE
from .command_help import TrustFlag
from .common import Json, make_console, make_table, print_fields
from .input_checks import require_base_exists
from .options import METHOD_FLAGS

LEGEND = """file: an adapter in Hugging Face form; merged: one plain model, also for
Ollama and vLLM; lora: an adapter in Ollama and vLLM.
Fields of one method: slimtune methods NAME"""


NARROW = 110
"""Columns of a screen below which what a method changes and its exports are on a line of their own."""


@dataclass(frozen=True)
class MethodExports:
    """The forms in which a method's adapter can leave slimtune."""

    hugging_face_file: bool
    """An adapter in Hugging Face form."""
    merged_model: bool
    """One plain model."""
    ollama_merged: bool
    """The plain model, in Ollama."""
    ollama_adapter: bool
    """An adapter in Ollama."""
    vllm_adapter: bool
    """An adapter in vLLM."""


@dataclass(frozen=True)
class MethodField:
    """A field of a method's config."""

    name: str
    """PEFT's name of the field."""
    expected: str
    """Its values, in words."""
    default: str
    """The default of the config class, as Python writes it."""
    recipe_default: str
    """The default of recipes, as Python writes it."""
    short_name: str | None
    """Another name in recipes; null: none."""
    flag: str | None
    """The flag of `slimtune train`; null: none of its own."""
    help: str
    """What it is, with its unit."""


@dataclass(frozen=True)
class MethodSize:
    """What a method trains on a base with the recipe's defaults."""

    trainable_params: int
    """Trained numbers."""
    trainable_percent: float
    """Their share of all numbers of base and adapter, in percent."""
    adapter_bytes: int
    """Size of the adapter's tensors."""


@dataclass(frozen=True)
class MethodDescription:
    """A method."""

    name: str
    """Its name in recipes."""
    summary: str
    """What it is, in one line."""
    papers: list[str]
    """Addresses of the papers."""
    sites: list[str]
    """Kinds of layers that it adapts; empty: every weight is trained."""
    mergeable: bool
    """Whether the adapter can be merged into the base."""
    export_formats: MethodExports
    """Where the adapter can go."""
    learning_rate: float
    """The default learning rate."""
    fields: list[MethodField] | None = field(default=None, metadata=OMIT_NONE)
    """The fields of its config, its own ones first."""
    size: MethodSize | None = field(default=None, metadata=INLINE)
    """What it trains; absent unless a base is given that it fits."""
    unfit: str | None = field(default=None, metadata=OMIT_NONE)
    """Why it cannot adapt the base with its defaults; absent if it can."""


@dataclass(frozen=True)
class MethodsResult:
    """What `methods --json` prints."""

    model: str | None
    """The base; null: none is given."""
    methods: list[MethodDescription]
    """The methods."""


def methods_table(
    name: Annotated[str | None, Argument(metavar="NAME", help="Show this method's fields.")] = None,
    model: Annotated[
        str | None, Option(help="A base, as for `slimtune train`: adds what each method trains on it.")
    ] = None,
    trust_remote_code: TrustFlag = False,
    sources: Annotated[
        bool, Option("--sources", help="Also show each method's papers, and where figures are from.")
    ] = False,
    as_json: Json = False,
) -> MethodsResult:
    """List the methods, or show the fields of one."""
    from ..core.adapters.method_registry import get_method_config_class, list_methods, require_known_method_name

    names = [require_known_method_name(name)] if name is not None else list_methods()
    if model is not None:
        require_base_exists(model, need_weights=False)

    has_fields = name is not None or as_json
    described = [_describe_method(get_method_config_class(n), has_fields) for n in names]
    if model is not None:
        source, sizes = _measure_sizes(map(get_method_config_class, names), model, trust_remote_code)
        described = [
            replace(method, unfit=size) if isinstance(size, str) else replace(method, size=size)
            for method, size in zip(described, sizes, strict=True)
        ]
    if not as_json:
        screen = make_console()
        screen.print(_methods_table(described, sized=model is not None, narrow=screen.width < NARROW))
        screen.print(f"\n{_describe_rate(names[0])}" if name else f"\n{LEGEND}")
        for setting in described[0].fields or ():
            other_names = ", ".join(n for n in (setting.short_name, setting.flag) if n)
            title = Text(f"\n{setting.name}", "bold") + Text(f" ({other_names})" if other_names else "", "not bold")
            text = f"   {setting.expected}; default {setting.default}"
            if setting.recipe_default != setting.default:
                text += f"; recipes: {setting.recipe_default}"
            screen.print(title + text)
            if setting.help:
                screen.print(Padding(Text(setting.help), (0, 0, 0, 4)), soft_wrap=False)
        if sources:
            screen.print()
            print_fields(
                (m.name, ", ".join(m.papers) or "no paper: see its page in the documentation") for m in described
            )
            if model is not None:
                how = "computed from the config without weights, with the defaults of recipes"
                print_fields([("trains, %, adapter", how), ("config", source)])
    return MethodsResult(model, described)


def _describe_rate(name: str) -> str:
    """Return a method's default learning rate in words."""
    from ..core.adapters.method_registry import get_method_config_class
    from ..core.adapters.peft_config import PeftConfig

    cls = get_method_config_class(name)
    depends = cls.default_learning_rate is not PeftConfig.default_learning_rate
    return f"default learning rate: {cls.learning_rate:g}" + ", more in short runs and for narrow bases" * depends


def _describe_method(cls: Any, has_fields: bool) -> MethodDescription:
    from ..core.adapters.method_registry import METHODS

    merged, lora = cls.mergeable, cls.uses_lora_file_format
    doc, module_doc = inspect.getdoc(cls) or "", METHODS.load(cls.name).__doc__ or ""
    return MethodDescription(
        name=cls.name,
        # The first line without the note on whose field names it uses.
        summary=doc.partition("\n")[0].partition("; PEFT's ")[0].rstrip("."),
        papers=re.findall(r"https?://[^\s,;)]+[^\s,;).]", module_doc),
        sites=list(cls.kinds),
        mergeable=merged,
        export_formats=MethodExports(
            hugging_face_file=True, merged_model=merged, ollama_merged=merged, ollama_adapter=lora, vllm_adapter=lora
        ),
        learning_rate=cls.learning_rate,
        fields=_describe_fields(cls) if has_fields else None,
    )


def _describe_fields(cls: Any) -> list[MethodField]:
    """Return the fields that a recipe may set, those that other methods do not have first."""
    from ..core.adapters.config_fields import list_settings
    from ..core.config.method_settings import fill_recipe_defaults

    short_names = {full: short for short, full in cls.short_names.items()}
    flags = {cls.short_names.get(short, short): f"--{short}" for short in METHOD_FLAGS}
    defaults = fill_recipe_defaults({}, cls)
    own = inspect.get_annotations(cls)
    return [
        MethodField(
            name=setting.name,
            expected=setting.expected,
            default=repr(setting.default),
            recipe_default=repr(defaults.get(setting.name, setting.default)),
            short_name=short_names.get(setting.name),
            flag=flags.get(setting.name),
            help=setting.description,
        )
        for setting in sorted(list_settings(cls), key=lambda setting: setting.name not in own)
        if setting.in_recipe
    ]


def _measure_sizes(classes: Iterable[Any], model: str, trust_remote_code: bool) -> tuple[str, list[MethodSize | str]]:
    """Return where a base's config is from, and what each method trains on it, or why it cannot adapt it.

    The base is on meta, without weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..core.adapters.adapter_tensors import get_adapter_tensors
    from ..core.adapters.peft_model import get_peft_model
    from ..core.config.method_settings import fill_recipe_defaults
    from ..core.models.base_config import load_base_config
    from ..core.models.load_errors import silence_and_translate_load_errors
    from ..errors import SlimtuneError

    info = load_base_config(model, trust_remote_code=trust_remote_code)
    sizes: list[MethodSize | str] = []
    with torch.device("meta"):
        with silence_and_translate_load_errors(model):
            # bf16, as in training: adapter tensors in the base's dtype are half as large then.
            how: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": trust_remote_code}
            base: Any = AutoModelForCausalLM.from_config(info.config, **how)
        for cls in classes:
            config = cls(task_type="CAUSAL_LM", **fill_recipe_defaults({}, cls))
            config.defer_initialization()  # the same tensors without data
            try:
                with warnings.catch_warnings(action="ignore"):  # training shows them
                    adapted = get_peft_model(base, config)
            except (SlimtuneError, ValueError) as e:
                sizes.append(getattr(e, "message", str(e)))
                continue
            trained, total = adapted.get_nb_trainable_parameters()
            tensors = get_adapter_tensors(adapted, "default").values()
            size = sum(t.numel() * t.element_size() for t in tensors)
            sizes.append(MethodSize(trained, 100 * compute_trained_share(cls.name, trained, total), size))
            base = adapted.unload()
    return info.source, sizes


def _methods_table(described: Sequence[MethodDescription], *, sized: bool, narrow: bool) -> Table:
    cells: list[tuple[str, ...]] = []
    for m in described:
        if m.unfit is not None:
            cells.append(("-", "-", "-", f"not with its defaults on this base: {m.unfit}"))
        elif m.size is not None:
            size = m.size
            percent = f"{size.trainable_percent:.3f}"
            cells.append((format_count(size.trainable_params), percent, format_bytes(size.adapter_bytes), m.summary))
        else:
            exports = {"file": True, "merged": m.mergeable, "lora": m.export_formats.ollama_adapter}
            names = ", ".join(name for name, possible in exports.items() if possible)
            changes = ", ".join(m.sites) or "every weight"
            cells.append((f"{m.summary}\n  {changes}; {names}",) if narrow else (changes, names, m.summary))
    rows = ((m.name, *row) for m, row in zip(described, cells, strict=True))
    if narrow and not sized:
        return make_table("method", "what it is; what it changes; exports", text_column_indices=[1], rows=rows)
    headings = ("trains", "%", "adapter") if sized else ("changes", "exports")
    made = make_table("method", *headings, "what it is", text_column_indices=[4] if sized else [1, 2, 3], rows=rows)
    made.padding = (0, 2, 0, 0)
    made.columns[0].min_width = max(len(m.name) for m in described)
    return made
