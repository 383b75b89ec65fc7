"""Load a base: model, tokenizer, and what a run has to know about them.

Weights come from safetensors only, and a base's own Python code runs only if the user trusts it. A weight that the
checkpoint lacks is an error, because transformers would fill it at random.
"""

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateSyntaxError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ModelError, UsageError, format_names, nearest
from ..utils.fingerprint import config_fingerprint
from .dtype import pick_device, pick_dtype
from .errors import translate_load_errors
from .quantization import keep_layout, quantization_config
from .registry import ModelSource, load_config_from, load_options, prepare_source, resolve_model

log = logging.getLogger(__name__)

TASKS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
# A classification head is new; nothing in a language model is.
_NEW_HEAD = {"SEQ_CLS", "TOKEN_CLS"}


@dataclass
class Base:
    """A loaded base.

    Args:
        model: in evaluation mode, on `device`.
        tokenizer: with a pad token, and the given chat template or its own.
        source: where it is from.
        dtype: of the weights; quantized ones compute in it.
        device: where the weights are.
        load_seconds: seconds spent on reading model and tokenizer.
        prepare_seconds: seconds spent on dequantizing a GGUF for the first time, else 0.
        fingerprint: 16 hex digits that name the base (see `config_fingerprint`).
        quantization: of its linear layers: "nf4", "int8", …; None: they are in `dtype`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    dtype: torch.dtype
    device: torch.device
    load_seconds: float
    prepare_seconds: float
    fingerprint: str
    quantization: str | None = None


def load_base(
    spec: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    task: str = "CAUSAL_LM",
    quantization: str | None = None,
) -> Base:
    """Load the base that `spec` names (see `registry.resolve_model`).

    Args:
        spec: alias, GGUF file, Hugging Face folder or Hub id.
        dtype: of the frozen weights, "auto": what the hardware multiplies fastest.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        trust_remote_code: run the base's own Python code.
        chat_template: a Jinja file, or Jinja text, that replaces the tokenizer's template.
        attn_implementation: transformers' name of the attention kernel; None: sdpa, or eager if the model needs it.
        revision: branch, tag or commit on the Hub.
        task: one of `TASKS`.
        quantization: of the linear layers, "nf4" or "int8"; None: as the checkpoint is stored.

    Raises:
        UsageError: a name, device, dtype, task or file that does not exist, untrusted code, or a `quantization` that
            the checkpoint contradicts.
        ModelError: the base cannot be found, reached or read, lacks weights or a tokenizer, or needs bitsandbytes.
        RunError: the disk or the memory is full.
    """
    auto = TASKS.get(task)
    if auto is None:
        raise UsageError(f"unknown task {task!r}{nearest(task, TASKS)}", format_names(TASKS))
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    template = read_template(chat_template)
    source = resolve_model(spec)
    where, prepare_seconds = prepare_source(source)
    start = time.perf_counter()
    options = load_options(source, trust_remote_code, revision)
    config = load_config_from(where, source, options)
    tokenizer = _tokenizer(where, source, options, template)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    stored, quantized = quantization_config(config, quantization, dtype, device, spec)
    with translate_load_errors(spec):
        model, info = auto.from_pretrained(
            where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **quantized
        )
        if not quantized:  # a quantized model is loaded onto its device, and int8 cannot be moved
            model.to(device)
    if stored is not None:
        keep_layout(model)
    _check_weights(info, source, task)
    _check_vocabulary(model, tokenizer, source)
    _set_model_pad(model, tokenizer)
    return Base(
        model=model.eval(),
        tokenizer=tokenizer,
        source=source,
        dtype=dtype,
        device=device,
        load_seconds=time.perf_counter() - start,
        prepare_seconds=prepare_seconds,
        fingerprint=config_fingerprint(model.config),
        quantization=stored,
    )


def load_tokenizer(
    spec: str,
    *,
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer alone, no weights; raises as `load_base` does."""
    template = read_template(chat_template)
    source = resolve_model(spec)
    where, _ = prepare_source(source)
    options = load_options(source, trust_remote_code, revision)
    load_config_from(where, source, options)
    return _tokenizer(where, source, options, template)


def weights_folder(source: ModelSource, revision: str | None = None) -> Path:
    """Return the folder with a base's weight files as they are stored; missing files of a Hub id are downloaded."""
    if source.kind != "hub":
        return Path(prepare_source(source)[0])
    with translate_load_errors(source.spec):
        return Path(snapshot_download(source.path, revision=revision, allow_patterns=["*.safetensors*", "*.json"]))


def read_template(given: str | Path | None) -> str | None:
    """Return the Jinja text of a chat template given as text or as a file; for None, None.

    Raises:
        UsageError: there is no such file, or it is empty.
    """
    if given is None or (isinstance(given, str) and ("{%" in given or "{{" in given)):
        return given
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        others = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(
            f"there is no chat template file {str(path)!r}{nearest(path.name, others)}", "a file of Jinja text"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the chat template {str(path)!r} cannot be read: {error}", "a file of Jinja text in UTF-8"
        ) from error
    if not text.strip():
        raise UsageError(f"the chat template {str(path)!r} is empty", "a file of Jinja text")
    return text


def _tokenizer(
    where: str, source: ModelSource, options: dict[str, Any], template: str | None
) -> PreTrainedTokenizerBase:
    with translate_load_errors(source.spec, "tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"the base {source.spec!r} has no tokenizer",
            "tokenizer.json and tokenizer_config.json beside the weights",
            "copy them from the checkpoint this one was made from",
        )
    _set_pad(tokenizer, source)
    if template is not None:
        tokenizer.chat_template = template
        _check_template(tokenizer)
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", "Jinja text"
        ) from error
    except Exception as error:
        # It may need a system message or tools; then rendering the data reports the row.
        log.debug("the chat template does not render a lone user turn: %s", error)


def _set_pad(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Give the tokenizer a pad token: one made for padding, else a reserved one, else the end of text."""
    if tokenizer.pad_token_id is not None:
        return
    added = [str(t) for t in tokenizer.added_tokens_decoder.values()]
    # Not any `…pad`: `<|image_pad|>` and `<|fim_pad|>` have a meaning.
    pad = r"[<\[]\|?(finetune_)?((right|left)_)?pad(ding)?(_id|_token)?\|?[>\]]"
    for pattern in (pad, r"<\|reserved_special_token_0\|>|<unused0>"):
        if found := next((t for t in added if re.fullmatch(pattern, t, re.IGNORECASE)), None):
            tokenizer.pad_token = found
            return
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer of {source.spec!r} has neither a pad token nor an end-of-text token",
            "one of them",
            "name it as pad_token in tokenizer_config.json",
        )
    tokenizer.pad_token = tokenizer.eos_token


def _check_weights(info: dict[str, Any], source: ModelSource, task: str) -> None:
    if missing := sorted(info["missing_keys"]):
        if task not in _NEW_HEAD:
            raise ModelError(
                f"the checkpoint {source.spec!r} lacks {len(missing)} weights: {format_names(missing, 4)}",
                f"every weight of a {task} model (a missing one would be filled at random)",
                "download it again, or choose the task that the base was made for",
            )
        log.warning("%s: new weights, to be trained: %s", source.name, format_names(missing, 8))
    if unused := sorted(info["unexpected_keys"]):
        log.warning("%s: unused weights of the checkpoint: %s", source.name, format_names(unused, 8))


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {source.spec!r} has ids up to {highest}, and the model has {rows} embeddings",
            "a tokenizer whose ids the model knows",
            "use the tokenizer of the same checkpoint, or resize the embeddings and save the base",
        )


def _set_model_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the pad token, which classification heads and `generate` read."""
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
