"""What is wrong with a foreign adapter on its base: keys, shapes, ranks, tied weights, tokens and template."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ...core.adapters.adapter_files import BASE_FINGERPRINT
from ...core.adapters.adapter_tensors import PREFIX
from ...core.adapters.name_patterns import find_matching_pattern
from ...core.adapters.peft_config import PeftConfig
from ...core.foundation.fingerprint import config_fingerprint
from ...core.models.loader import load_tokenizer
from ...core.models.model_source import resolve_model_source
from ...errors import AdapterError, ModelError
from ...methods.lora.init_configs import is_init_subtracted_from_base
from .adapter_findings import AdapterFinding, make_finding
from .foreign_adapter import ForeignAdapter, read_small_json
from .key_placement import KeyPlacement, Shape, group_lora_pairs
from .tensor_findings import generalize_layer_indices

MAX_TOKENIZER_BYTES = 256 << 20
_SPECIAL_TOKENS = ("bos_token", "eos_token")
_FLAGS = {"lora_B.bias": ("lora_bias", "bias-flag-missing"), "lora_magnitude_vector": ("use_dora", "dora-flag-missing")}
"""Flags of a LoRA's config by the tensors that they are about, and the finding where one is missing."""
_MISPLACED = {
    "older-names": "have older names", "expert-layout": "are of experts in another layout",
    "untargeted": "are of modules that the config leaves out", "another-method": "are none of the config's method: ",
    "projection-layout": "are ", "unknown-modules": "are of no module of the base",
}  # fmt: skip
"""What keys are, by the code of the finding; their names follow."""
_QUANTIZED = re.compile(r"(?i)bnb|nf4|int[48]|[48][-_]?bit|gptq|awq")
"""In a base's name."""
_VARIANTS = frozenset({"base", "chat", "instruct", "it", "pt", "thinking"})
"""Words by which the names of models with the same shapes differ."""


def find_config_faults(adapter: ForeignAdapter, config: PeftConfig) -> Iterator[AdapterFinding]:
    """Yield what is wrong with a LoRA's config and its tensors, without the base."""
    if config.name != "lora":
        return
    modules = {m.removeprefix(PREFIX): pair for m, pair in group_lora_pairs(adapter.tensors).items()}
    settings: Any = config
    if "lora_alpha" not in adapter.config:
        yield make_finding("alpha-missing", "adapter_config.json has no lora_alpha")
    for tensor, (flag, code) in _FLAGS.items():
        flagged = [key for key in adapter.tensors if f".{tensor}" in key]
        if flagged and not getattr(settings, flag):
            yield make_finding(code, f"{flag} is false, and {len(flagged)} tensors are {tensor}", flagged)
    if settings.use_dora and not any("lora_magnitude_vector" in key for key in adapter.tensors):
        yield make_finding("magnitudes-missing", "use_dora is true, and no tensor is a magnitude")
    if settings.trainable_token_indices and not any("trainable_tokens" in key for key in adapter.tensors):
        yield make_finding("saved-module-missing", "the file has no rows of the tokens in trainable_token_indices")
    if is_init_subtracted_from_base(settings.init_lora_weights):
        yield make_finding("start-in-base", f"init_lora_weights is {settings.init_lora_weights!r}")
    # PEFT writes patterns for experts' parameters, too.
    places = [*modules, *(f"model.{name}" for name in settings.target_parameters or [])]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(settings, name)
        if unused := [p for p in patterns if not any(find_matching_pattern([p], place) for place in places)]:
            yield make_finding("pattern-unmatched", f"{name} has entries that match no module with tensors", unused)
    if settings.target_parameters:
        return
    shapes = {module: adapter.tensors[a].shape for module, (a, _) in modules.items() if a is not None}
    # A matrix whose other dimension is the rank is transposed, which the base's shapes tell.
    wrong = [m for m, s in shapes.items() if len(s) > 1 and s[0] and settings.get_rank(m) not in (s[0], s[-1])]
    if wrong:
        ranks = f"{shapes[wrong[0]][0]} for {settings.get_rank(wrong[0])} in {wrong[0]}"
        yield make_finding(
            "rank-differs", f"{len(wrong)} modules have another rank than the config says: {ranks}", wrong
        )


def find_placement_faults(placement: KeyPlacement, adapter: ForeignAdapter) -> Iterator[AdapterFinding]:
    """Yield which keys do not reach their modules, and which modules have no tensors."""
    of_all = f"of {len(adapter.tensors)} keys"
    for what, keys in placement.renamed.items():
        yield make_finding("key-prefix", f"in {len(keys)} {of_all} {what}", keys)
    there, here = (
        sorted({int(m[1]) for key in some if (m := re.search(r"\.(\d+)\.", key))})
        for some in (adapter.tensors, placement.expected)
    )
    layers = ""
    if there and here and there[-1] > here[-1]:
        layers = f"; the file has layers {there[0]} to {there[-1]}, the base {here[0]} to {here[-1]}"
    for code, what in _MISPLACED.items():
        found = {key: name for key, name in placement.by_finding[code].items() if name not in _FLAGS}
        if found:
            names = " and ".join([*dict.fromkeys(found.values())][:4])
            what += layers if code == "unknown-modules" else names
            yield make_finding(code, f"{len(found)} {of_all} {what}", [*found])
    yield from _find_missing(placement)


def _find_missing(placement: KeyPlacement) -> Iterator[AdapterFinding]:
    found = {*placement.placed.values(), *(key.replace(".base_layer.", ".") for key in placement.weights)}
    whole = {m: [k for k in placement.expected if k.startswith(f"{PREFIX}{m}.")] for m in placement.whole_modules}
    if lost := [module for module, keys in whole.items() if keys and not found.intersection(keys)]:
        yield make_finding("saved-module-missing", f"the file has no weights of {len(lost)} such modules", lost)
    in_whole = {key for keys in whole.values() for key in keys}
    modules: dict[str, bool] = {}  # whether it has tensors, in the base's order
    for key in (key for key in placement.expected if key not in in_whole):
        module = re.split(r"\.(?=lora_|[^.]+$)", key.removeprefix(PREFIX), maxsplit=1)[0]
        modules[module] = modules.get(module, False) or key in found
    kinds = {generalize_layer_indices(module) for module, has_tensors in modules.items() if has_tensors}
    absent = [module for module, has_tensors in modules.items() if not has_tensors]
    layers = [module for module in absent if generalize_layer_indices(module) in kinds]
    if layers:
        yield make_finding("missing-layers", f"{len(layers)} modules have no tensors, others of their kind do", layers)
    # Where no key has a place at all, the findings about keys say why.
    if found and (others := [module for module in absent if module not in layers]):
        what = f"{len(others)} modules that the config selects have no tensors"
        yield make_finding("untargeted-in-file", what, others)


def find_placed_shape_faults(
    placement: KeyPlacement, adapter: ForeignAdapter, config: PeftConfig
) -> Iterator[AdapterFinding]:
    """Yield which placed tensors have another shape than their module, by the cause."""
    found = group_misshapen_keys(placement, adapter)
    found.pop("rank-differs", None)  # the config's findings have it
    if config.name == "adalora":  # prunes ranks
        found.pop("another-shape", None)
    for code, keys in found.items():
        there, here = adapter.tensors[keys[0]].shape, placement.shapes[keys[0]]
        yield make_finding(code, f"{len(keys)} tensors: {list(there)} in the file, {list(here)} on the base", keys)


def group_misshapen_keys(placement: KeyPlacement, adapter: ForeignAdapter) -> dict[str, list[str]]:
    """Return the keys of placed tensors that have another shape than their module, by the code of the finding."""
    found: dict[str, list[str]] = defaultdict(list)
    shapes = {key: (adapter.tensors[key].shape, here) for key, here in placement.shapes.items()}
    for key, (there, here) in shapes.items():
        if there != here and len(there) == len(here) and 0 not in there:
            found[_classify_shape(key, there, here)].append(key)
    swapped = [
        key
        for a, b in group_lora_pairs(dict.fromkeys([*found["transposed"], *found["another-shape"]])).values()
        if a is not None and b is not None
        and (shapes[a][0][0], shapes[b][0][-1]) == (shapes[b][1][0], shapes[a][1][-1])
        for key in (a, b)
    ]  # fmt: skip
    if {*swapped} & {*found["another-shape"]}:  # a square module alone does not tell it from transposed matrices
        found["halves-swapped"] = swapped
        for code in ("transposed", "another-shape"):
            found[code] = [key for key in found[code] if key not in swapped]
    if shards := _find_shards(shapes, {*found["another-shape"]}):
        found |= {"another-shape": [], "shards": shards}
    return {code: keys for code, keys in found.items() if keys}


def _find_shards(shapes: Mapping[str, tuple[Shape, Shape]], wrong: set[str]) -> list[str]:
    """Return the keys of wrong shape if they are one matrix of most modules, of which the file has a whole fraction."""
    pairs = [wrong & {*pair} for pair in group_lora_pairs(shapes).values()]
    alone = [key for keys in pairs if len(keys) == 1 for key in keys]
    fractions = all(whole % part == 0 for key in alone for part, whole in zip(*shapes[key], strict=True))
    return alone if fractions and 2 * len(alone) > len(pairs) and len(alone) == len(wrong) else []


def _classify_shape(key: str, there: Shape, here: Shape) -> str:
    if there == here[::-1]:
        return "transposed"
    differing = [i for i, (a, b) in enumerate(zip(there, here, strict=True)) if a != b]
    letter = re.search(r"\.lora_(?:embedding_)?([AB])\b", key)
    if letter is not None and differing == ["AB".index(letter[1])]:
        return "rank-differs"
    is_vocabulary = len(differing) == 1 and re.search("embed|lm_head", key)
    return "vocabulary" if is_vocabulary else "another-shape"


def find_tied_faults(model: Any, placement: KeyPlacement, adapter: ForeignAdapter) -> Iterator[AdapterFinding]:
    """Yield what an adapter does to a head that shares its weight with the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    changing = [k for k in placement.shapes if "trainable_tokens" not in k]  # PEFT ties these rows
    of_head, of_embedding = ([k for k in changing if names[id(module)] in k] for module in (head, embedding))
    whole = [[k for k in keys if k.endswith(".weight") and "lora_" not in k] for keys in (of_head, of_embedding)]
    if all(whole):
        a, b = (adapter.load_tensor(keys[0]) for keys in whole)
        if a.shape != b.shape or not a.equal(b):
            found = "the base ties head and embedding, the file has two values of them"
            yield make_finding("tied-weights-differ", found, [keys[0] for keys in whole])
    elif bool(of_head) != bool(of_embedding):
        found = "the adapter changes one of two modules that share their weight"
        yield make_finding("tied-head", found, of_head or of_embedding)


def find_token_faults(adapter: ForeignAdapter, config: PreTrainedConfig) -> Iterator[AdapterFinding]:
    """Yield what a tokenizer beside an adapter has that the base's embedding has not."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    added: dict[str, int] = {}
    with suppress(AdapterError, OSError, TypeError, KeyError, ValueError, AttributeError):
        if (file := adapter.folder / "added_tokens.json").exists():
            added |= {str(k): int(v) for k, v in read_small_json(file).items()}
        if (file := adapter.folder / "tokenizer.json").exists():
            tokens = read_small_json(file, MAX_TOKENIZER_BYTES).get("added_tokens") or []
            added |= {str(t["content"]): int(t["id"]) for t in tokens}
    beyond = [token for token, number in added.items() if size is not None and number >= size]
    has_embedding = any("embed" in key or "wte" in key or "token_adapter" in key for key in adapter.tensors)
    if beyond and not has_embedding:
        found = f"{len(beyond)} added tokens have ids from {size}, where the base's embedding ends"
        yield make_finding("added-tokens-unsaved", found, beyond)


def _read_template_and_special_tokens(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Return the chat template beside an adapter, and its beginning and end tokens; what is not there is left out."""
    template, tokens = None, {}
    with suppress(AdapterError, OSError):
        if (file := folder / "tokenizer_config.json").exists():
            values = read_small_json(file)
            template = values.get("chat_template")
            tokens = {name: values.get(name) for name in _SPECIAL_TOKENS}
        if (file := folder / "chat_template.jinja").exists() and file.is_file() and file.stat().st_size < 1 << 20:
            template = file.read_text(errors="replace")
    contents = {n: t.get("content") if isinstance(t, Mapping) else t for n, t in tokens.items()}
    return template if isinstance(template, str) else None, {n: t for n, t in contents.items() if isinstance(t, str)}


def find_tokenizer_faults(adapter: ForeignAdapter, spec: str) -> Iterator[AdapterFinding]:
    """Yield how template and special tokens beside an adapter differ from the base's, whose tokenizer is loaded."""
    template, tokens = _read_template_and_special_tokens(adapter.folder)
    if template is None and not tokens:
        return
    if resolve_model_source(spec).kind == "hub":
        raise ModelError("the base's tokenizer is not on this disk")
    tokenizer = load_tokenizer(spec)
    own = tokenizer.chat_template
    if template is not None and template.strip() != (own or "").strip():
        found = "the template beside the adapter is not the base's" if own else "the base has no chat template"
        yield make_finding("template", found)
    if differing := [n for n, token in tokens.items() if token != getattr(tokenizer, n, None)]:
        pairs = ", ".join(f"{n} {tokens[n]!r} for {getattr(tokenizer, n, None)!r}" for n in differing)
        yield make_finding("special-tokens", f"other special tokens than the base's: {pairs}", differing)


def find_recorded_base_faults(adapter: ForeignAdapter, config: PreTrainedConfig, spec: str) -> Iterator[AdapterFinding]:
    """Yield that the base is another one than the file and its config record: by fingerprint, name or quantization."""
    trained, given = (Path(str(name or "")).name for name in (adapter.config.get("base_model_name_or_path"), spec))
    if adapter.config.get("init_lora_weights") == "loftq":
        yield make_finding("quantized-base", "init_lora_weights is 'loftq': it makes up for the rounding of its base")
    elif _QUANTIZED.search(trained) and not _QUANTIZED.search(given) and not hasattr(config, "quantization_config"):
        yield make_finding("quantized-base", f"it was trained on {trained}, and {given} is not quantized")
    names = [{w for w in re.split(r"[-_. ]+", n.lower()) if not _QUANTIZED.search(w)} for n in (trained, given)]
    if trained and (names[0] ^ names[1]) and (names[0] ^ names[1]) <= _VARIANTS:
        yield make_finding("another-variant", f"it was trained on {trained}, and is compared with {given}")
    recorded, here = adapter.metadata.get(BASE_FINGERPRINT), config_fingerprint(config)
    if recorded and recorded != here:
        found = f"the base's config has fingerprint {here}, the file was trained on {recorded}"
        yield make_finding("another-base", found)
