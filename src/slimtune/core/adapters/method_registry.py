"""The registry of methods: a folder (or module) in `slimtune/methods/` is one method and has its name.

It has a config class (a `PeftConfig`) whose `name` is that name. Third parties register methods through the
entry point group `slimtune.methods`: `name = "package.module"`.
"""

from functools import cache
from typing import Any

from ...errors import ConfigError, format_names, suggest
from ..foundation.registry import Registry

METHODS: Registry[Any] = Registry("slimtune.methods", "method")
"""The modules of the methods; those of slimtune import no torch before a config builds adapter modules."""
ALIASES = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}
"""Short names of methods in other tools."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("lora", {"use_dora": True}),
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
}
"""Names of papers about one setting of a method: the method, and the setting."""
MISSING = {
    "bitfit": ("beft",), "oft": ("boft", "hra", "psoft", "road"), "prefix_tuning": ("cartridge",),
    "lora": ("adamss", "delora", "glora", "gralora", "lily", "poly", "xlora"),
    "prompt_tuning": ("cpt", "multitask_prompt_tuning"), "vera": ("pvera", "randlora", "tinylora", "unilora", "vblora"),
    "": ("c3a", "deft", "fourierft", "frod", "osf", "peanut", "shadow", "supertuning", "waveft"),
}  # fmt: skip
"""PEFT's methods that are not here, by the method here that is nearest in kind; "": none is."""


@cache
def list_methods() -> tuple[str, ...]:
    """Return the names of all methods, built-in and registered by entry points, sorted; none is imported."""
    return tuple(sorted(METHODS.names()))


def require_known_method_name(name: str) -> str:
    """Return the name of a method in lower case, without importing it; `"lora"` for PEFT's `"LORA"`.

    Raises:
        ConfigError: there is no such method; the error names the known ones and the nearest.
    """
    method, known = str(name).lower(), list_methods()
    if method not in known and method in {*ALIASES, *VARIANTS, "qlora"}:
        variant_of, settings = VARIANTS.get(method, (ALIASES.get(method, "lora"), {}))
        flags = "".join(f" --set method.{k}={str(v).lower()}" for k, v in settings.items())
        flags += " --quantization nf4" if method == "qlora" else ""
        raise ConfigError(f"there is no method {name!r}: it is a setting", f"--method {variant_of}{flags}")
    for near, missing in MISSING.items():
        if method in missing and method not in known:
            hint = f"nearest in kind: {near}" if near else "none here is of its kind; PEFT itself trains it"
            message = f"{method!r} is a method of PEFT; slimtune lacks this method"
            raise ConfigError(message, "", hint, code="peft-name-missing")
    if method not in known:
        raise ConfigError(f"there is no method {name!r}{suggest(method, known)}", f"one of {format_names(known)}")
    return method


def get_method_config_class(name: str) -> Any:
    """Return the config class of a method; name and errors as for `require_known_method_name`."""
    return METHODS.load_class(require_known_method_name(name))
