"""`slimtune methods`: what can be trained, and each method's fields, read from the methods' config classes."""

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ..core.foundation.formatting import format_bytes, format_count
from .common import Json, make_console, make_table, print_fields
from .input_checks import require_base_exists
from .options import METHOD_FLAGS, TrustFlag

LEGEND = """file: an adapter in Hugging Face form; merged: one plain model, also for
Ollama and vLLM; lora: an adapter in Ollama and vLLM.
Fields of one method: slimtune methods NAME"""


NARROW = 110
"""Columns of a screen below which what a method changes and its exports are on a line of their own."""


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
) -> dict[str, Any]:
    """List the methods, or show the fields of one."""
    from ..core.adapters.method_registry import get_method_config_class, list_methods, resolve_method_name

    names = [resolve_method_name(name)] if name is not None else list_methods()
    if model is not None:
        require_base_exists(model, weights=False)

    has_fields = name is not None or as_json
    described = [_describe_method(get_method_config_class(n), has_fields) for n in names]
    if model is not None:
        source, sizes = _measure_sizes(map(get_method_config_class, names), model, trust_remote_code)
        for method, size in zip(described, sizes, strict=True):
            method.update(size)
    if not as_json:
        screen = make_console()
        screen.print(_methods_table(described, sized=model is not None, narrow=screen.width < NARROW))
        screen.print(f"\n{_describe_rate(names[0])}" if name else f"\n{LEGEND}")
        for field in described[0]["fields"] if name else ():
            other_names = ", ".join(n for n in (field["short_name"], field["flag"]) if n)
            title = Text(f"\n{field['name']}", "bold") + Text(f" ({other_names})" if other_names else "", "not bold")
            text = f"   {field['expected']}; default {field['default']}"
            if field["recipe_default"] != field["default"]:
                text += f"; recipes: {field['recipe_default']}"
            screen.print(title + text)
            if field["help"]:
                screen.print(Padding(Text(field["help"]), (0, 0, 0, 4)), soft_wrap=False)
        if sources:
            screen.print()
            print_fields(
                (m["name"], ", ".join(m["papers"]) or "no paper: see its page in the documentation") for m in described
            )
            if model is not None:
                how = "computed from the config without weights, with the defaults of recipes"
                print_fields([("trains, %, adapter", how), ("config", source)])
    return {"model": model, "methods": described}


def _summarize(name: str, doc: str, module_doc: str, constants: Mapping[str, Any]) -> dict[str, Any]:
    merged, lora = constants["mergeable"], constants["ships_as_lora"]
    return {
        "name": name,
        # The first line without the note on whose field names it uses.
        "summary": doc.partition("\n")[0].partition("; PEFT's ")[0].rstrip("."),
        "papers": re.findall(r"https?://[^\s,;)]+[^\s,;).]", module_doc),
        "sites": list(constants["kinds"]),
        "mergeable": merged,
        "export_formats": {
            "hugging_face_file": True,
            "merged_model": merged,
            "ollama_merged": merged,
            "ollama_adapter": lora,
            "vllm_adapter": lora,
        },
        "learning_rate": constants["learning_rate"],
    }


def _describe_rate(name: str) -> str:
    """Return a method's default learning rate in words."""
    from ..core.adapters.method_registry import get_method_config_class
    from ..core.adapters.peft_config import PeftConfig

    cls = get_method_config_class(name)
    depends = cls.default_learning_rate is not PeftConfig.default_learning_rate
    return f"default learning rate: {cls.learning_rate:g}" + ", more in short runs and for narrow bases" * depends


def _describe_method(cls: Any, has_fields: bool) -> dict[str, Any]:
    from ..core.adapters.method_registry import METHODS
    from ..core.config.method_settings import fill_method_defaults, list_recipe_method_fields

    constants = {n: getattr(cls, n) for n in ("kinds", "learning_rate", "mergeable", "ships_as_lora")}
    doc, module_doc = inspect.getdoc(cls) or "", METHODS.load(cls.name).__doc__ or ""
    short_names = {full: short for short, full in cls.short_names.items()}
    flags = {cls.short_names.get(short, short): f"--{short}" for short in METHOD_FLAGS}
    defaults = fill_method_defaults({}, cls)
    own = inspect.get_annotations(cls)
    described = _summarize(cls.name, doc, module_doc, constants)
    if has_fields:
        described["fields"] = [
            {
                "name": field.name,
                "expected": field.expected,
                "default": repr(field.default),
                "recipe_default": repr(defaults.get(field.name, field.default)),
                "short_name": short_names.get(field.name),
                "flag": flags.get(field.name),
                "help": field.description,
            }
            for field in sorted(list_recipe_method_fields(cls).values(), key=lambda field: field.name not in own)
        ]
    return described


def _measure_sizes(classes: Iterable[Any], model: str, trust_remote_code: bool) -> tuple[str, list[dict[str, Any]]]:
    """Return where a base's config is from, and what each method trains on it with the recipe's defaults.

    The base is on meta, without weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ..core.adapters.adapter_tensors import get_adapter_tensors
    from ..core.adapters.peft_model import get_peft_model
    from ..core.config.method_settings import fill_method_defaults
    from ..core.models.base_config import load_base_config
    from ..core.models.load_errors import silence_and_translate_load_errors
    from ..errors import SlimtuneError

    info = load_base_config(model, trust_remote_code=trust_remote_code)
    sizes: list[dict[str, Any]] = []
    with torch.device("meta"):
        with silence_and_translate_load_errors(model):
            # bf16, as in training: adapter tensors in the base's dtype are half as large then.
            how: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": trust_remote_code}
            base: Any = AutoModelForCausalLM.from_config(info.config, **how)
        for cls in classes:
            settings = {"task_type": "CAUSAL_LM", **fill_method_defaults({}, cls)}
            try:
                with warnings.catch_warnings(action="ignore"):  # training shows them
                    adapted = get_peft_model(base, cls(**settings))
            except (SlimtuneError, ValueError) as e:
                sizes.append({"unfit": getattr(e, "message", str(e))})
                continue
            trained, total = adapted.get_nb_trainable_parameters()
            tensors = get_adapter_tensors(adapted, "default").values()
            sizes.append({
                "trainable_params": trained,
                "trainable_percent": 100 * trained / total,
                "adapter_bytes": sum(t.numel() * t.element_size() for t in tensors),
            })  # fmt: skip
            base = adapted.unload()
    return info.source, sizes


def _methods_table(described: list[dict[str, Any]], *, sized: bool, narrow: bool) -> Table:
    cells: list[tuple[str, ...]] = []
    for m in described:
        if "unfit" in m:
            cells.append(("-", "-", "-", f"not with its defaults on this base: {m['unfit']}"))
        elif sized:
            size = (
                format_count(m["trainable_params"]),
                f"{m['trainable_percent']:.3f}",
                format_bytes(m["adapter_bytes"]),
            )
            cells.append((*size, m["summary"]))
        else:
            exports = {"file": True, "merged": m["mergeable"], "lora": m["export_formats"]["ollama_adapter"]}
            names = ", ".join(name for name, possible in exports.items() if possible)
            changes = ", ".join(m["sites"]) or "every weight"
            cells.append((f"{m['summary']}\n  {changes}; {names}",) if narrow else (changes, names, m["summary"]))
    if narrow and not sized:
        rows = ((m["name"], *row) for m, row in zip(described, cells, strict=True))
        return make_table("method", "what it is; what it changes; exports", left=[1], rows=rows)
    headings = ("trains", "%", "adapter") if sized else ("changes", "exports")
    rows = ((m["name"], *row) for m, row in zip(described, cells, strict=True))
    made = make_table("method", *headings, "what it is", left=[4] if sized else [1, 2, 3], rows=rows)
    made.padding = (0, 2, 0, 0)
    made.columns[0].min_width = max(len(m["name"]) for m in described)
    return made
