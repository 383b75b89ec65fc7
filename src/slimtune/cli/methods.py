"""`slimtune methods`: what can be trained, and each method's fields, read from the classes."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..utils.formatting import format_bytes, format_count
from .common import Json, console, table
from .train import FLAGS

_LEGEND = """file: an adapter beside its base, in Hugging Face form; merged: one plain model, for Ollama and vLLM, too
fields, ranges and defaults of one: slimtune methods NAME"""


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method's fields.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A base, as `slimtune train --model` takes it: adds what each method trains on it."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the base run code of its own.", show_default=False)
    ] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the methods, or show the fields of one."""
    from ..methods import config_class, method_names

    classes = {c.name: c for c in map(config_class, [name] if name else method_names())}
    found = [_described(n, c) for n, c in classes.items()]
    if model is not None:
        for method, size in zip(found, _sizes(classes.values(), model, trust_remote_code), strict=True):
            method.update(size)
    if not as_json:
        screen = console()
        screen.print(_overview(found, sized=model is not None))
        if name:
            screen.print(f"\nlearning rate: recipes start from {found[0]['learning_rate']:g}", markup=False)
            _show_fields(screen, found[0]["fields"])
        else:
            screen.print(f"\n{_LEGEND}", markup=False)
    return {"model": model, "methods": found}


def _described(name: str, cls: Any) -> dict[str, Any]:
    from ..config.method import known_fields, resolved

    short = {full: s for s, full in cls.short_names.items()}
    defaults = resolved({}, cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    told, own = _told(cls), vars(cls).get("__annotations__", {})
    return {
        "name": name,
        # Whose field names they are is for those who look the fields up.
        "summary": re.sub(r"; PEFT's [^;]*$", "", (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")),
        "sites": list(cls.kinds),
        "mergeable": cls.mergeable,
        "export_formats": {
            "hugging_face_file": True,
            "merged_model": cls.mergeable,
            "ollama_merged": cls.mergeable,
            "ollama_adapter": cls.ships_as_lora,
            "vllm_adapter": cls.ships_as_lora,
        },
        "learning_rate": cls.learning_rate,
        "fields": [
            {
                "name": n,
                "type": str(fields[n].type),
                "default": repr(_default(fields[n])),
                "recipe_default": repr(defaults.get(n, _default(fields[n]))),
                "short_name": short.get(n),
                "flag": _flag(n, short.get(n)),
                "about": told.get(n, ""),
            }
            for n in sorted(known_fields(cls), key=lambda n: n not in own)
        ],
    }


def _sizes(classes: Iterable[Any], spec: str, trust_remote_code: bool) -> list[dict[str, Any]]:
    """Return what each method trains on a base with the recipe's defaults; the base is built on meta, no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..adapters.model import get_peft_model
    from ..adapters.state_dict import get_adapter_tensors
    from ..config.method import resolved
    from ..errors import SlimtuneError
    from ..models.errors import translate_load_errors
    from ..models.registry import load_config

    config = load_config(spec, trust_remote_code=trust_remote_code)
    found = []
    with torch.device("meta"):
        with translate_load_errors(spec):
            # As training holds it: what follows the base's dtype is half as large then.
            how: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": trust_remote_code}
            base: Any = AutoModelForCausalLM.from_config(config, **how)
        for cls in classes:
            try:
                settings = {"task_type": "CAUSAL_LM", **resolved({}, cls)}
                with warnings.catch_warnings(action="ignore"):  # training says them
                    adapted = get_peft_model(base, cls(**settings))
            except (SlimtuneError, ValueError) as e:
                found.append({"unfit": getattr(e, "message", str(e))})
                continue
            trained, every = adapted.get_nb_trainable_parameters()
            size = sum(t.numel() * t.element_size() for t in get_adapter_tensors(adapted, "default").values())
            found.append(
                {"trainable_params": trained, "trainable_percent": 100 * trained / every, "adapter_bytes": size}
            )
            base = adapted.unload()
    return found


def _overview(found: list[dict[str, Any]], *, sized: bool) -> Any:
    rows = table("method", *(("trains", "%", "adapter") if sized else ()), "sites", "ships as", "what it changes")
    rows.columns[0].no_wrap, rows.columns[0].min_width = True, max(len(m["name"]) for m in found)
    for column in rows.columns[-3:]:
        column.justify, column.no_wrap = "left", False
    for method in found:
        if "unfit" in method:
            why = f"not with its defaults on this base: {method['unfit']}"
            rows.add_row(method["name"], "-", "-", "-", "", "", escape(why))
            continue
        size = (
            (format_count(method["trainable_params"]), f"{method['trainable_percent']:.3f}",
             format_bytes(method["adapter_bytes"])) if sized else ()
        )  # fmt: skip
        rows.add_row(
            method["name"],
            *size,
            ", ".join(method["sites"]),
            _ships(method["export_formats"]),
            escape(method["summary"]),
        )
    return rows


def _ships(ships: dict[str, bool]) -> str:
    merged = "merged" if ships["merged_model"] else ""
    adapter = "adapter in Ollama, vLLM" if ships["ollama_adapter"] else ""
    return "; ".join(t for t in ("file", merged, adapter) if t)


def _show_fields(screen: Any, fields: list[dict[str, Any]]) -> None:
    for f in fields:
        other = ", ".join(n for n in (f["short_name"], f["flag"]) if n)
        start = "" if f["recipe_default"] == f["default"] else f"; recipes start from {f['recipe_default']}"
        screen.print(f"\n{f['name']}", style="bold", end="", markup=False)
        screen.print(f"{f' ({other})' if other else ''}   default {f['default']}{start}", markup=False)
        screen.print(f"    {f['about']}", markup=False)


def _flag(name: str, short: str | None) -> str | None:
    flags = {path: f"--{flag.replace('_', '-')}" for flag, path in FLAGS.items()}
    return flags.get(f"method.{name}") or flags.get(f"method.{short}")


def _told(cls: type) -> dict[str, str]:
    """Return what the docstrings' Args say of each field, a class's own words before its parents'."""
    told: dict[str, str] = {}
    for c in cls.__mro__:
        lines = inspect.cleandoc(vars(c).get("__doc__") or "").partition("Args:\n")[2].splitlines()
        entry = None
        for line in lines:
            if line.strip() and not line.startswith(" "):
                break  # the next section
            if new := re.match(r" {4}(\w+): (.*)", line):
                entry = new[1] if new[1] not in told else None
                if entry:
                    told[entry] = new[2]
            elif entry and line.strip():
                told[entry] += f" {line.strip()}"
    return told


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "needed"
