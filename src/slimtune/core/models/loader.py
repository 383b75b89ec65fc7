"""Load a base: model, tokenizer, and what a run has to know about them.

Weights come from safetensors only, and a base's own Python code runs only if the user trusts it. A weight that the
checkpoint lacks is an error, because transformers would fill it at random.
"""

import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ...errors import ModelError, UsageError, format_names, suggest
from ..foundation.chat_rendering import CHAT_TEMPLATE_SETTERS
from ..foundation.fingerprint import config_fingerprint
from ..kernels.frozen_product import use_faster_frozen_products
from .base_config import PreparedBase, get_hidden_size, load_config_and_convert_base
from .dtype import pick_device, pick_dtype
from .load_errors import silence_and_translate_load_errors
from .model_source import BASE_READERS, ModelSource
from .quantization import BASE_QUANTIZATIONS, resolve_quantization_and_load_args

log = logging.getLogger(__name__)

TASKS: dict[str, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_NEW_HEAD = {"SEQ_CLS", "TOKEN_CLS"}  # a classification head is new; nothing in a language model is


@dataclass
class LoadedBase:
    """A loaded base."""

    model: PreTrainedModel  # in evaluation mode
    tokenizer: PreTrainedTokenizerBase  # with a pad token, and the given chat template, its own or a built-in one
    source: ModelSource
    dtype: torch.dtype  # of the weights; quantized ones compute in it
    device: torch.device
    load_seconds: float  # spent on reading model and tokenizer
    prepare_seconds: float  # spent on making a folder of a base in another format
    fingerprint: str  # 16 hex digits that name the base
    loaded_config: dict[str, Any]  # the fields of its config as it was loaded; an adapter may change the model's
    quantization: str | None = None  # of its linear layers: "nf4", "int8", …
    new_weights: tuple[str, ...] = ()  # that the checkpoint lacks and training makes: those of a classification head
    revision: str | None = None  # branch, tag or commit of a base from the Hub

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return get_hidden_size(self.model.config)

    def download_weights(self) -> Path:
        """Return the folder with the weight files as they are stored; those of a Hub id are downloaded if missing."""
        source = self.source
        if source.kind in BASE_READERS.names():
            return BASE_READERS.load(source.kind).get_or_make_hf_folder_and_seconds(Path(source.path))[0]
        if source.kind == "folder":
            return Path(source.path)
        files = ["*.safetensors*", "*.json"]
        with silence_and_translate_load_errors(source.spec):
            return Path(snapshot_download(source.path, revision=self.revision, allow_patterns=files))


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
    head: Mapping[str, Any] | None = None,
) -> LoadedBase:
    """Load a base with its tokenizer.

    Args:
        spec: alias, GGUF file, Hugging Face folder or Hub id.
        dtype: of the frozen weights, "auto": what the hardware multiplies fastest.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        trust_remote_code: run the base's own Python code.
        chat_template: a built-in template's name, a Jinja file, or Jinja text, that replaces the tokenizer's template.
        attn_implementation: transformers' name of the attention kernel; None: sdpa, or eager if the model needs it.
        revision: branch, tag or commit on the Hub.
        task: one of `TASKS`.
        quantization: of the linear layers, "nf4" or "int8"; None: as the checkpoint is stored.
        head: fields of the config that describe a classification head (`id2label`, `label2id`, `problem_type`).

    Raises:
        UsageError: a name, device, dtype, task or file that does not exist, untrusted code, or a `quantization` that
            the checkpoint contradicts.
        ModelError: the base cannot be found, reached or read, lacks weights or a tokenizer, or needs bitsandbytes.
        RunError: the disk or the memory is full.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}{suggest(task, TASKS)}", format_names(TASKS))
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    opened = load_config_and_convert_base(spec, trust_remote_code=trust_remote_code, revision=revision)
    start = time.perf_counter()
    tokenizer = _load_tokenizer(opened, chat_template)
    quantization, options = resolve_quantization_and_load_args(opened.config, quantization, dtype, device, spec)
    is_placed = bool(options)  # bitsandbytes loads onto the device, and int8 cannot be moved
    options |= opened.options | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    for name, value in (head or {}).items():
        setattr(opened.config, name, value)
    options |= {"config": opened.config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    # A new head is the same in every load of a base.
    with silence_and_translate_load_errors(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, info = get_auto_class(opened.config, task).from_pretrained(opened.location, **options)
        if not is_placed:
            model.to(device)
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{spec!r} contains an adapter beside the base, which names another base that was loaded instead",
            "a folder of a base alone",
            "move adapter_config.json and the adapter's weights to a folder of their own",
        )
    if quantization is not None and quantization in BASE_QUANTIZATIONS.names():
        BASE_QUANTIZATIONS.load(quantization).prevent_cpu_weight_repacking(model)
    _check_weights(model, tokenizer, info, opened.source, task, warn=head is None)
    if device.type == "cpu":
        use_faster_frozen_products(model)
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id  # for classification heads and `generate`
    return LoadedBase(
        model=model.eval(),
        tokenizer=tokenizer,
        source=opened.source,
        dtype=dtype,
        device=device,
        load_seconds=time.perf_counter() - start,
        prepare_seconds=opened.prepare_seconds,
        fingerprint=config_fingerprint(model.config),
        loaded_config=model.config.to_dict(),
        quantization=quantization,
        new_weights=tuple(sorted(info["missing_keys"])),
        revision=revision,
    )


def get_auto_class(config: PreTrainedConfig, task: str = "CAUSAL_LM") -> Any:
    """Return the auto class of a task; language models that also see images have one of their own."""
    sees_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if task == "CAUSAL_LM" and sees_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForImageTextToText
    return TASKS[task]


def load_tokenizer(
    spec: str, *, trust_remote_code: bool = False, chat_template: str | Path | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer alone, no weights; as `load_base`."""
    opened = load_config_and_convert_base(spec, trust_remote_code=trust_remote_code, revision=revision)
    return _load_tokenizer(opened, chat_template)


def _load_tokenizer(opened: PreparedBase, template: str | Path | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a pad token; `template` replaces its chat template."""
    spec = opened.source.spec
    with silence_and_translate_load_errors(spec, "tokenizer of"):
        tokenizer = AutoTokenizer.from_pretrained(opened.location, **opened.options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(
            f"the base {spec!r} has no tokenizer",
            "tokenizer.json and tokenizer_config.json beside the weights",
            "copy them from the checkpoint this one was made from",
        )
    longest, own = tokenizer.model_max_length, tokenizer.chat_template
    templates = own.values() if isinstance(own, dict) else [own]
    has_length = isinstance(longest, int | float) and longest >= 1
    if not has_length or not all(isinstance(t, str | None) for t in templates):
        wrong = f"chat_template is {own!r:.80}" if has_length else f"model_max_length is {longest!r:.80}"
        hint = "repair tokenizer_config.json, or download it again"
        raise ModelError(f"the tokenizer of {spec!r} is damaged: {wrong}", "a number of tokens, and Jinja text", hint)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _find_pad_token(tokenizer)
        if tokenizer.pad_token is None:
            raise ModelError(
                f"the tokenizer of {spec!r} has neither a pad token nor an end-of-text token",
                hint="name one as pad_token in tokenizer_config.json",
            )
    # Rows and prompts that are too long are refused in slimtune's words; transformers' warning adds nothing.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    CHAT_TEMPLATE_SETTERS.load("files")(tokenizer, template, opened.source.name)
    return tokenizer


def _find_pad_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a token made for padding, else a reserved one, else the end of text."""
    added = [str(t) for t in tokenizer.added_tokens_decoder.values()]
    # Not any `…pad`: `<|image_pad|>` and `<|fim_pad|>` have a meaning.
    made_for_padding = r"[<\[]\|?(finetune_)?((right|left)_)?pad(ding)?(_id|_token)?\|?[>\]]"
    for pattern in (made_for_padding, r"<\|reserved_special_token_0\|>|<unused0>"):
        if found := next((t for t in added if re.fullmatch(pattern, t, re.IGNORECASE)), None):
            return found
    return tokenizer.eos_token


def _check_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    info: dict[str, Any],
    source: ModelSource,
    task: str,
    warn: bool,
) -> None:
    """Raise if the checkpoint lacks weights, or embeddings for the tokenizer's ids; `warn` about a new head."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing and task not in _NEW_HEAD:
        raise ModelError(
            f"the checkpoint {source.spec!r} lacks {len(missing)} weights: {format_names(missing, 4)}",
            f"every weight of a {task} model (a missing one would be filled at random)",
            "download it again, or choose the task that the base was made for",
        )
    if missing and warn:
        log.warning("%s: new weights, to be trained: %s", source.name, format_names(missing, 8))
    unused = [name for name in unused if task not in _NEW_HEAD or not name.startswith("lm_head.")]
    if unused:
        log.warning("%s: unused weights of the checkpoint: %s", source.name, format_names(unused, 8))
    embeddings: Any = model.get_input_embeddings()
    highest, rows = max(tokenizer.get_vocab().values()), embeddings.weight.shape[0]
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {source.spec!r} has ids up to {highest}, and the model has {rows} embeddings",
            hint="use the tokenizer of the same checkpoint, or resize the embeddings and save the base",
            code="cuda-device-assert",
        )
