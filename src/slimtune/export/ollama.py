"""Write what Ollama needs to serve a trained model: a Modelfile, and the two commands that build and start it.

    FROM      a name from Ollama's library (it keeps its own TEMPLATE), a GGUF file, or a merged Hugging Face folder
    ADAPTER   the adapter's GGUF beside the Modelfile, unless it is merged; Ollama before 0.34.1 alone takes this line
    TEMPLATE  the run's chat template in Ollama's syntax (ollama_template.py)
    SYSTEM, PARAMETER stop (the tokens that end an answer), PARAMETER num_ctx (tokens of the window)

**The beginning-of-sequence token.** Ollama puts it before the prompt if the weights say so: a GGUF by
`tokenizer.ggml.add_bos_token`, a folder by `add_bos_token` in tokenizer_config.json. The TEMPLATE then leaves it out;
two of them would silently cost quality.
"""

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.models.base_config import get_max_positions
from ..core.models.load_errors import silence_and_translate_load_errors
from ..errors import UsageError, format_names
from ..extras.gguf_loading import import_gguf
from ..extras.installed_programs import find_ollama_version
from .ollama_template import OllamaTemplate, convert_chat_template, is_go_printable

DEFAULT_WINDOW = 4096
"""Tokens of Ollama's own window when a Modelfile sets none; the smallest set here unless the model has less."""
NO_ADAPTER_LINE = (0, 34, 1)
"""First release of Ollama (September 2026) that creates no model from a Modelfile with an ADAPTER line."""
_MODEL_NAME = re.compile(  # host, namespace, model, tag
    r"(?:(?:[a-z0-9_][\w.:-]{0,349}/)?[a-z0-9_][\w-]{0,79}/)?[a-z0-9_][\w.-]{0,79}(?::[a-z0-9_][\w.-]{0,79})?",
    re.I | re.A,
)


@dataclass(frozen=True)
class ModelfileContent:
    """What a Modelfile says."""

    commands: list[str]  # that build and start the model
    template: str | None  # the TEMPLATE; None: the base keeps its own, or none could be made
    stops: list[str]  # the stop tokens
    num_ctx: int  # tokens of the window
    notes: list[str]  # one sentence each


def write_modelfile(
    folder: Path,
    *,
    base_name_or_path: str,
    adapter_gguf: Path | None,
    tokenizer: Any,
    config: Any,
    name: str,
    system: str | None = None,
    max_seq_len: int | None = None,
    num_ctx: int | None = None,
    final_path: Path | None = None,
) -> ModelfileContent:
    """Write `Modelfile` into an export folder.

    Args:
        folder: the export folder while it is written.
        base_name_or_path: a name from a registry (`llama3.1:8b`, `hf.co/…`), or the path of a GGUF file or of a merged
            Hugging Face folder; an existing path wins over a name. A path inside `folder` is written relative to it.
        adapter_gguf: the adapter's GGUF inside `folder`; None: it is merged into the base.
        tokenizer, config: of the run, with the chat template it was trained with, and of the model.
        name: of the new model in Ollama: `[host/][namespace/]model[:tag]`.
        system: system prompt of every conversation that has none.
        max_seq_len: tokens of the longest row that the run accepted.
        num_ctx: tokens of the window; None: the larger of Ollama's default and `max_seq_len`, up to the model's limit.
        final_path: the final path of `folder`; None: `folder` itself.
    """
    if not _MODEL_NAME.fullmatch(name):
        expected = "[host/][namespace/]model[:tag] of letters, digits, _, - and . (only _ at the beginning)"
        raise UsageError(f"Ollama does not accept the name {name!r}", expected, "give another --name")
    path = require_base_path_unless_registry_name(base_name_or_path)
    converted, stops = OllamaTemplate(None), []
    lines = [("FROM", base_name_or_path if path is None else _relative_path(path, folder))]
    if adapter_gguf is not None:
        lines.append(("ADAPTER", _relative_path(adapter_gguf, folder)))
    if path is None:
        show = shlex.join(["ollama", "show", "--template", base_name_or_path])
        notes = [f"{base_name_or_path} keeps its own TEMPLATE and stop tokens; compare: {show}"]
    else:
        converted = convert_chat_template(tokenizer, ollama_adds_bos(path, tokenizer))
        notes = list(converted.notes)
        # What ends an answer: the token that the template writes after it, and the model's own.
        ids = getattr(config.get_text_config(), "eos_token_id", None)
        ids = [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
        own = tokenizer.convert_ids_to_tokens([i for i in ids if i is not None])
        stops = list(dict.fromkeys([*converted.stops, *filter(None, own)]))
    if converted.template is not None:
        lines.append(("TEMPLATE", converted.template))
    if system is not None:
        if not system.strip():
            raise UsageError("the system prompt is empty", "some text", "leave out --system")
        if converted.takes_system_prompt is False:
            raise UsageError("the chat template of this model takes no system prompt", hint="leave out --system")
        lines.append(("SYSTEM", system))
    limit = get_max_positions(config)
    if num_ctx is not None and (num_ctx < 1 or (limit and num_ctx > limit)):
        raise UsageError(f"a window of {num_ctx} tokens", f"1 to {limit or 'the limit of the model'}", "--num-ctx")
    window = num_ctx or min(max(DEFAULT_WINDOW, max_seq_len or 0), limit or sys.maxsize)
    lines += [*(("PARAMETER stop", token) for token in stops), ("PARAMETER num_ctx", str(window))]
    if adapter_gguf is not None:
        first, version = ".".join(map(str, NO_ADAPTER_LINE)), find_ollama_version()
        if tuple(map(int, re.findall(r"\d{1,9}", version)[:3])) >= NO_ADAPTER_LINE:
            message = f"Ollama {version} on this machine creates no model from an ADAPTER line"
            raise UsageError(message, f"base and adapter as one model, or an Ollama before {first}", "--merged")
        notes.append(f"Ollama from {first} on creates no model from an ADAPTER line; --merged works with every Ollama")
    (folder / "Modelfile").write_bytes(format_modelfile(lines).encode("utf-8"))
    modelfile = re.sub("^-", "./-", str((final_path or folder) / "Modelfile"))
    commands = [shlex.join(["ollama", "create", name, "-f", modelfile]), shlex.join(["ollama", "run", name])]
    return ModelfileContent(commands, converted.template, stops, window, notes)


def ollama_adds_bos(base_file_or_folder: Path, tokenizer: Any) -> bool:
    """Return whether Ollama puts the beginning-of-sequence token before a prompt.

    `base_file_or_folder` is a GGUF, or a folder that Ollama converts; the tokenizer decides if a GGUF does not say.
    """
    if base_file_or_folder.is_dir():
        file = base_file_or_folder / "tokenizer_config.json"
        with silence_and_translate_load_errors(str(base_file_or_folder), "model folder"):
            return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("add_bos_token") is True
    gguf = import_gguf()
    with silence_and_translate_load_errors(str(base_file_or_folder), "GGUF file"):
        setting = gguf.GGUFReader(str(base_file_or_folder)).fields.get("tokenizer.ggml.add_bos_token")
        if setting is not None:
            return bool(setting.contents())
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def require_base_path_unless_registry_name(base_name_or_path: str) -> Path | None:
    """Return the path of a base, None for a name from a registry."""
    path = Path(base_name_or_path).expanduser()
    try:
        exists = bool(base_name_or_path) and path.exists()
    except (OSError, ValueError):  # no path at all
        exists = False
    if not exists:
        if _MODEL_NAME.fullmatch(base_name_or_path) and not base_name_or_path.endswith(".gguf"):
            return None
        expected = "a name such as llama3.1:8b, a GGUF file, or a merged Hugging Face folder"
        raise UsageError(f"the base {base_name_or_path!r} does not exist", expected, "give another --ollama-base")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UsageError(f"{path} is not a GGUF file", "a file that begins with GGUF", "another --ollama-base")
    elif not (path / "config.json").is_file() or not any(path.glob("model*.safetensors")):
        expected = "config.json and model*.safetensors in it, as slimtune merge writes them"
        raise UsageError(f"Ollama cannot read the folder {path}", expected, "slimtune merge RUN --out FOLDER")
    elif linked := [f.name for f in sorted(path.iterdir()) if not f.resolve().is_relative_to(path.resolve())]:
        # A snapshot in the Hub's cache is such a folder.
        message = f"{path} contains links to files elsewhere, which Ollama refuses: {format_names(linked)}"
        raise UsageError(message, "the files themselves", f"cp -rL {shlex.quote(str(path))} FOLDER")
    return path


def _relative_path(path: Path, folder: Path) -> str:
    """Return a path as a Modelfile in `folder` names it: absolute, or with ./ (Ollama expands ~, and reads names)."""
    full, home = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return f"./{full.relative_to(home).as_posix()}" if full.is_relative_to(home) else full.as_posix()


# --- Modelfile -------------------------------------------------------------------------------------------------------


def format_modelfile(lines: list[tuple[str, str]]) -> str:
    """Return the text of a Modelfile, so quoted that Ollama reads back exactly these values.

    A value is bare to the end of the line, or between " " or triple quotes over several lines. Quotes have no escape: a
    quoted value ends at the first line end that has its closing quotes before it. Ollama drops characters that Go does
    not call printable. So each quoting is tried until one carries the value, and a value that none carries is refused:
    no value can become an instruction. `lines` are pairs of instruction ("PARAMETER stop" for a parameter) and value.
    """
    text = ""
    for name, value in lines:
        if dropped := sorted({c for c in value if not is_go_printable(c) and c not in "\t\n\r"}):
            codes = format_names(f"U+{ord(c):04X}" for c in dropped)
            message = f"{name} contains characters that Ollama drops from a Modelfile: {codes}"
            expected = "printable characters, spaces, tabs and line ends"
            raise UsageError(message, expected, "replace them (a no-break space by a space)")
        forms = [f'"""{value}"""', f'"{value}"']
        if name not in ("TEMPLATE", "SYSTEM"):
            bare = value and value == value.strip() and value[0] not in "\"'#" and not set("\r\n") & set(value)
            forms = [*([value] if bare and name != "PARAMETER stop" else ()), *reversed(forms)]
        form = next((f for f in forms if _reads_back(f, value)), None)
        if form is None:
            expected = "no line that ends in double quotes, since a Modelfile has no escape for them"
            hint = "end that line with another character, or rename the file"
            raise UsageError(f"{name} cannot be quoted in a Modelfile: {value!r}", expected, hint)
        text += f"{name} {form}\n"
    return text


def _reads_back(form: str, value: str) -> bool:
    """Return whether Ollama reads `value` from a quoted form: no earlier line end closes it, and its own end does."""
    line_ends = (i for i, char in enumerate(form) if char in "\r\n")
    return all(_unquote(form[:i]) is None for i in line_ends) and _unquote(form) == value


def _unquote(text: str) -> str | None:
    """Return the value, None while its quotes are open."""
    text = text.strip(" \t\r\n")
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text
