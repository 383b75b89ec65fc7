"""What Ollama needs to serve a trained model: a Modelfile, and the two lines that build and start it.

    FROM      a name from Ollama's library (it keeps its own TEMPLATE), a GGUF file, or a merged Hugging Face folder
    ADAPTER   the adapter's GGUF beside the Modelfile, unless it is merged
    TEMPLATE  the run's chat template in Ollama's syntax, proven equal to it (chat_template.py)
    SYSTEM, PARAMETER stop (the tokens that end an answer), PARAMETER num_ctx (tokens of the window)

**The beginning-of-sequence token.** Ollama puts it before the prompt itself where the weights say so: a GGUF by
`tokenizer.ggml.add_bos_token`, a folder by `add_bos_token` in tokenizer_config.json. The TEMPLATE then leaves it out;
twice there, it costs quality without a word of warning to the user.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError, format_names
from ..models.errors import translate_load_errors
from .chat_template import Turned, turn
from .modelfile import Line, written

WINDOW = 4096
"""Tokens: Ollama's own window where a Modelfile names none; never less here, unless the model holds less."""
_NAME = re.compile(  # host, namespace, model, tag
    r"(?:(?:[a-z0-9_][\w.:-]{0,349}/)?[a-z0-9_][\w-]{0,79}/)?[a-z0-9_][\w.-]{0,79}(?::[a-z0-9_][\w.-]{0,79})?",
    re.I | re.A,
)


@dataclass(frozen=True)
class OllamaFolder:
    """What was written.

    Args:
        modelfile: where the Modelfile will lie.
        create: the shell line that builds the model.
        run: the shell line that starts it.
        template: the TEMPLATE; None: the base keeps its own, or none could be made (`notes` says why).
        stops: the stop tokens written.
        num_ctx: tokens of the window.
        notes: what a user must know, each a sentence.
    """

    modelfile: Path
    create: str
    run: str
    template: str | None
    stops: tuple[str, ...]
    num_ctx: int
    notes: tuple[str, ...]


def write_ollama(
    folder: Path,
    *,
    base_from: str,
    adapter: Path | None,
    tokenizer: Any,
    config: Any,
    name: str,
    system: str | None = None,
    max_seq_len: int | None = None,
    num_ctx: int | None = None,
    out: Path | None = None,
) -> OllamaFolder:
    """Write `Modelfile` into an export folder.

    Args:
        folder: of the export, open for writing.
        base_from: a name from Ollama's library or another registry (`llama3.1:8b`, `hf.co/…`), the path of a GGUF file,
            or of a merged Hugging Face folder; what lies at that path counts before a name that reads the same. A path
            inside `folder` is written relative to it.
        adapter: the adapter's GGUF, inside `folder`; None: the base has it merged.
        tokenizer: of the run, with the chat template it was trained with.
        config: of the model.
        name: of the new model in Ollama: `[host/][namespace/]model[:tag]`.
        system: system prompt of every conversation that brings none.
        max_seq_len: tokens of the longest row that the run took.
        num_ctx: tokens of the window; None: as many as Ollama takes by itself and the run's rows need, no more than the
            model holds.
        out: where `folder` will lie when it is finished; None: where it lies now.

    Raises:
        UsageError: the name, a path or the system prompt cannot be in a Modelfile, the base is not there, the window is
            larger than the model's, or the chat template knows no system prompt.
        ModelError: the base is damaged, or a GGUF file cannot be read here.
    """
    if not _NAME.fullmatch(name):
        wanted = "[host/][namespace/]model[:tag] of letters, digits, _, - and . (none of them first but _)"
        raise UsageError(f"{name!r} is no name that Ollama takes", wanted, "give another --name")
    base = _base_path(base_from)
    turned = Turned(None) if base is None else turn(tokenizer, adds_bos(base, tokenizer))
    _require_system(system, turned)
    window = _window(config, max_seq_len, num_ctx)
    stops = _stops(tokenizer, config, turned) if base else ()
    lines: list[Line] = [("FROM", base_from if base is None else _place(base, folder))]
    if adapter is not None:
        lines.append(("ADAPTER", _place(_existing(adapter), folder)))
    if turned.template is not None:
        lines.append(("TEMPLATE", turned.template))
    if system is not None:
        lines.append(("SYSTEM", system))
    lines += [("PARAMETER stop", token) for token in stops]
    lines.append(("PARAMETER num_ctx", str(window)))
    (folder / "Modelfile").write_bytes(written(lines).encode("utf-8"))
    modelfile = (out or folder) / "Modelfile"
    notes = turned.notes if base else (_keeps_its_own(base_from),)
    create = shlex.join(["ollama", "create", name, "-f", _no_flag(modelfile)])
    return OllamaFolder(modelfile, create, shlex.join(["ollama", "run", name]), turned.template, stops, window, notes)


def _keeps_its_own(name: str) -> str:
    return f"{name} keeps its own TEMPLATE and stop tokens; compare: ollama show --template {shlex.quote(name)}"


def adds_bos(base: Path, tokenizer: Any) -> bool:
    """Return whether Ollama puts the beginning-of-sequence token before a prompt itself.

    Args:
        base: a GGUF file, or a folder that Ollama converts.
        tokenizer: what counts where a GGUF file does not say.

    Raises:
        ModelError: the base is damaged, or cannot be read here.
    """
    if base.is_dir():
        file = base / "tokenizer_config.json"
        with translate_load_errors(str(base), "model folder"):
            return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("add_bos_token") is True
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {base.name} needs the package gguf, which is not installed", hint="pip install gguf")
    from gguf import GGUFReader  # heavy, optional

    with translate_load_errors(str(base), "GGUF file"):
        said = GGUFReader(str(base)).fields.get("tokenizer.ggml.add_bos_token")
        if said is not None:
            return bool(said.contents())
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _base_path(base_from: str) -> Path | None:
    """Return where a base lies, None for a name from a registry.

    Raises:
        UsageError: it is neither.
    """
    path = Path(base_from).expanduser()
    try:
        there = bool(base_from) and path.exists()
    except (OSError, ValueError):
        there = False
    if not there and _NAME.fullmatch(base_from) and not base_from.endswith(".gguf"):
        return None
    if not there:
        wanted = "a name such as llama3.1:8b, a GGUF file, or a merged Hugging Face folder"
        raise UsageError(f"the base {base_from!r} is not there", wanted, "give another --from")
    if path.is_dir():
        if not (path / "config.json").is_file() or not any(path.glob("model*.safetensors")):
            wanted = "config.json and model*.safetensors in it, as slimtune merge writes them"
            raise UsageError(f"{path} is no model that Ollama reads", wanted, "slimtune merge RUN --out FOLDER")
        if out := [f.name for f in sorted(path.iterdir()) if not f.resolve().is_relative_to(path.resolve())]:
            # A snapshot in the Hub's cache is such a folder.
            got = f"{path} holds links to files elsewhere, which Ollama refuses: {format_names(out)}"
            raise UsageError(got, "the files themselves", f"cp -rL {shlex.quote(str(path))} FOLDER")
        return path
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file", "a file that begins with GGUF", "give another --from")
    return path


def _existing(adapter: Path) -> Path:
    if not adapter.is_file():
        raise UsageError(f"the adapter {adapter} is not there", "a GGUF file in the export's folder")
    return adapter


def _place(path: Path, folder: Path) -> str:
    """Return a path as a Modelfile in `folder` names it; Ollama expands ~ and takes names for a registry's."""
    full, home = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return f"./{full.relative_to(home).as_posix()}" if full.is_relative_to(home) else full.as_posix()


def _no_flag(path: Path) -> str:
    return f"./{path}" if str(path).startswith("-") else str(path)


def _require_system(system: str | None, turned: Turned) -> None:
    if system is not None and not system.strip():
        raise UsageError("the system prompt is empty", "some text", "leave --system out")
    if system is not None and turned.system is False:
        raise UsageError(
            "the chat template of this model has no place for a system prompt",
            "a conversation of user and assistant alone",
            "leave --system out",
        )


def _window(config: Any, max_seq_len: int | None, num_ctx: int | None) -> int:
    holds = getattr(config.get_text_config(), "max_position_embeddings", None)
    if num_ctx is not None and (num_ctx < 1 or (holds and num_ctx > holds)):
        raise UsageError(f"a window of {num_ctx} tokens", f"1 to {holds or 'as many as the model holds'}", "--num-ctx")
    asked = num_ctx or max(WINDOW, max_seq_len or 0)
    return min(asked, holds) if holds else asked


def _stops(tokenizer: Any, config: Any, turned: Turned) -> tuple[str, ...]:
    """Return the tokens that end an answer: the one the template writes after it, and those the model ends with."""
    ids = getattr(config.get_text_config(), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    known = tokenizer.convert_ids_to_tokens([i for i in (*ids, tokenizer.eos_token_id) if i is not None])
    return tuple(dict.fromkeys([*turned.stops, *(t for t in known if t)]))
