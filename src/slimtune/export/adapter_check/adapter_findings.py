"""What can be wrong with an adapter's file, and the result of checking it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Literal, NamedTuple

from ...core.foundation.formatting import format_bytes, format_count

Severity = Literal["fault", "warning"]
SHOWN_KEYS = 2
"""Keys of the file that a finding names."""


class Mend(Enum):
    """How `slimtune repair` mends a finding, in the order in which it does; the value says what is done."""

    SELECT_ADAPTER = "one of the adapters is taken: --adapter NAME"
    GIVE_ALPHA = "lora_alpha is written: --alpha NUMBER"
    RENAME_KEYS = "the keys get the base's names"
    CONVERT_EXPERTS = "the experts' matrices get the base's layout"
    TRANSPOSE = "the matrices are transposed"
    LEAVE_OUT_UNTRAINED = "modules without an update are left out"
    SELECT_MODULES = "the config selects the modules of the file"
    READ_RANKS = "ranks are read from the matrices"
    MARK_FLAGS = "use_dora and lora_bias are set as the tensors are"
    SWAP_HALVES = "A and B change their names"
    SPLIT_PROJECTIONS = "the projections are split as the base has them"
    FOLD_START = "the start is folded into A and B"
    MERGE = "base and adapter are written as one model"
    CARRY_TOKENIZER = "tokenizer and template are written beside the adapter"


class FindingKind(NamedTuple):
    """A fault that a file can have: what it means for whoever loads the file, and the way out."""

    severity: Severity
    expected: str
    fix: str
    mend: Mend | None = None  # None: only the trainer, or another file, can mend it


fault, warning = partial(FindingKind, "fault"), partial(FindingKind, "warning")

_SAVE_AGAIN = "save it again where it was trained, with save_pretrained of the unwrapped PEFT model"
FINDING_KINDS = {
    # --- the file by itself
    "no-tensors": fault("the trained tensors", f"{_SAVE_AGAIN}; gather them from all processes first"),
    "empty-tensors": fault("matrices", "DeepSpeed ZeRO-3 saved its placeholders: gather the parameters before saving, "
        "as stage3_gather_16bit_weights_on_model_save does"),
    "flat-tensors": fault("matrices of two dimensions",
        "FSDP or DeepSpeed saved shards: gather the full state dict, then save"),
    "not-finite": fault("finite values", "the training diverged: use an earlier checkpoint, or a lower learning rate"),
    "whole-numbers": fault("floating-point values", _SAVE_AGAIN),
    "untrained": fault("an update B·A other than 0",
        "the training changed nothing: no gradient reached the adapter, or it was saved before the first step"),
    "untrained-modules": fault("an update B·A other than 0 in some layer", "no gradient reached these modules: leave "
        "them out of the targets, or train with a library that computes them", Mend.LEAVE_OUT_UNTRAINED),
    "untrained-layers": warning("an update B·A other than 0", "these layers learned nothing; if that was not meant, "
        "look whether they are frozen or skipped in the forward"),
    "missing-half": fault("both A and B of each module", _SAVE_AGAIN),
    "several-adapters": fault("one adapter in a file", "save each alone: save_pretrained(selected_adapters=[…])",
        Mend.SELECT_ADAPTER),
    # --- the config beside it
    "config-unreadable": fault("an adapter_config.json as PEFT writes it",
        "take the adapter_config.json that was saved with the tensors", Mend.GIVE_ALPHA),
    "rank-differs": fault("the rank of `r` and `rank_pattern`", "correct r in adapter_config.json: a reader that "
        "takes the scale alpha / r from it applies another strength", Mend.READ_RANKS),
    "targets-unmatched": fault("targets that match modules of the base",
        "check it against the base it was trained on: --base", Mend.SELECT_MODULES),
    "pattern-unmatched": fault("patterns that match a module with tensors",
        "write the patterns with the base's names of its modules: such an entry changes no rank and no scale",
        Mend.READ_RANKS),
    "magnitudes-missing": fault("lora_magnitude_vector of each module, since use_dora is true",
        "save it again with a PEFT that has DoRA; a LoRA without magnitudes has use_dora: false"),
    "dora-flag-missing": fault("use_dora: true, since the file has magnitudes",
        "set use_dora: true in adapter_config.json", Mend.MARK_FLAGS),
    "bias-flag-missing": fault("lora_bias: true, since the file has biases of B",
        "set lora_bias: true in adapter_config.json", Mend.MARK_FLAGS),
    "start-in-base": warning("a start that B·A alone does not need the base for",
        "engines that only add B·A give something else: merge, or save with path_initial_model_for_weight_conversion",
        Mend.FOLD_START),
    "alpha-missing": warning("lora_alpha in adapter_config.json",
        "write the alpha of the training: readers assume 8, or r", Mend.GIVE_ALPHA),
    # --- against the base
    "key-prefix": fault("the base's own names of its modules, after base_model.model.",
        "rename the keys: as they are, loaders skip these tensors and answer as the base does", Mend.RENAME_KEYS),
    "older-names": warning("the names that transformers gives the modules now",
        "rename the keys: PEFT and slimtune translate them, engines with names of their own may skip them",
        Mend.RENAME_KEYS),
    "expert-layout": fault("experts as the base has them (split into modules, or stacked in one parameter)",
        "convert the experts' matrices to the base's layout: as they are, loaders skip them", Mend.CONVERT_EXPERTS),
    "projection-layout": fault("projections as the base has them: q_proj, k_proj and v_proj, or one qkv_proj",
        "convert the matrices to the base's projections: as they are, loaders skip them", Mend.SPLIT_PROJECTIONS),
    "halves-swapped": fault("A of shape (r, in) and B of shape (out, r)", "give each matrix the other's name",
        Mend.SWAP_HALVES),
    "transposed": fault("A of shape (r, in) and B of shape (out, r)",
        "transpose these matrices, or train with a library that writes PEFT's layout", Mend.TRANSPOSE),
    "untargeted": fault("modules that the config selects", "add them to target_modules (to modules_to_save, if they "
        "are trained in full): PEFT skips their tensors", Mend.SELECT_MODULES),
    "another-method": fault("the tensors of the method in adapter_config.json",
        "take the adapter_config.json that was saved with the tensors: by this one, loaders skip them"),
    "unknown-modules": fault("modules of the base", "check it against the base it was trained on: --base"),
    "another-shape": fault("the shapes of the base's modules", "check it against the base it was trained on: --base"),
    "shards": fault("whole matrices", "one process's share of tensor parallelism was saved: gather all, then save"),
    "missing-layers": fault("tensors of each layer that the config selects",
        f"only a part of the layers was saved: {_SAVE_AGAIN}"),
    "untargeted-in-file": warning("tensors of each kind of module that the config selects",
        "these modules stay as the base has them; if that was not meant, save the adapter again", Mend.SELECT_MODULES),
    "saved-module-missing": fault("the weights of each module in modules_to_save",
        "the trained head or embedding is not in the file: save it again, or take an earlier checkpoint"),
    "vocabulary": fault("as many rows as the base's embedding",
        "resize the base's embeddings to the adapter's tokenizer before loading it, and serve that base"),
    "added-tokens-unsaved": fault("the embeddings of the added tokens in the file",
        "save with save_embedding_layers=True, or with the embeddings in modules_to_save"),
    "tied-weights-differ": fault("one value of a weight that the base ties",
        "untie the base's head before merging or serving, or train with ensure_weight_tying=True", Mend.MERGE),
    "tied-head": warning("an adapter of the embedding and the head together, since the base ties them",
        "do not merge it with a library that writes the change into the shared weight; untie the head first",
        Mend.MERGE),
    "another-base": fault("the base that the adapter was trained on", "give that base: --base; or train again"),
    "another-variant": warning("the base that the adapter was trained on",
        "give that base, or compare an engine: --at; the same shapes do not mean the same weights"),
    "quantized-base": warning("a base quantized as in training",
        "serve it so, or compare an engine (--at): beside other weights the same adapter gives other answers"),
    "template": warning("the chat template of the base, or a server that is given the adapter's",
        "give the engine the adapter's template: vllm serve --chat-template, llama-server --chat-template-file",
        Mend.CARRY_TOKENIZER),
    "special-tokens": warning("the base's special tokens",
        "serve it with the tokenizer beside the adapter, or answers do not end", Mend.CARRY_TOKENIZER),
}  # fmt: skip
"""By the code of a finding. A fault: a reader that follows PEFT's format does not compute what was trained."""


@dataclass(frozen=True)
class AdapterFinding:
    """One thing that is wrong with an adapter."""

    code: str
    """What is wrong, in one word: `key-prefix`, `untrained`, …"""
    severity: Severity
    """A fault: a reader that follows PEFT's format does not compute what was trained."""
    found: str
    """What the file has."""
    expected: str
    """What would be right."""
    fix: str
    """The way out."""
    keys: list[str]
    """The first few keys or modules that it is about."""
    count: int
    """How many keys or modules it is about."""
    mend: str | None = None
    """What `slimtune repair` does about it; null: only the trainer, or another file, can mend it."""


def make_finding(code: str, found: str, keys: Sequence[str] = ()) -> AdapterFinding:
    """Return the finding of a kind: what was found, and the keys that it is about."""
    kind = FINDING_KINDS[code]
    mend = kind.mend.value if kind.mend is not None else None
    return AdapterFinding(code, kind.severity, found, kind.expected, kind.fix, list(keys[:SHOWN_KEYS]), len(keys), mend)


@dataclass(frozen=True)
class LayerUpdateNorm:
    """How much an adapter changes one layer."""

    layer: str
    """Its index, or the module's name outside of the layers."""
    norm: float
    """Frobenius norm of scale · B · A over the layer's modules."""
    modules: int
    """Adapted modules."""


@dataclass(frozen=True)
class AdapterFileCheck:
    """What is wrong with an adapter's file, and what could not be checked."""

    adapter: str
    """The adapter folder."""
    base: str | None
    """The base it was compared with; null: none was at hand."""
    method: str
    """Method by its config, "lora" for example; "unknown" if the config does not say."""
    tensors: int
    """Tensors in the file."""
    placed: int | None
    """Tensors that belong to a module of the base; null: not compared."""
    bytes: int
    """Of the file."""
    right: bool
    """Whether no fault was found."""
    findings: list[AdapterFinding]
    """What is wrong, faults first."""
    not_proven: list[str]
    """What was not checked, and why, one sentence each."""
    layers: list[LayerUpdateNorm]
    """How much the adapter changes each layer; empty for other methods than LoRA."""
    seconds: float
    """That the check of the file took."""

    def lines(self) -> Iterator[str]:
        """Yield what was found, for people."""
        base = f" against {self.base}" if self.base else ""
        placed = "" if self.placed is None else f", {format_count(self.placed)} placed"
        yield f"{self.adapter}{base}"
        yield f"{self.method}: {format_count(self.tensors)} tensors{placed}, {format_bytes(self.bytes)}"
        if norms := [layer.norm for layer in self.layers]:
            yield f"{len(norms)} layers change; norm of the update {min(norms):.3g} to {max(norms):.3g}"
        for f in self.findings:
            yield ""
            yield f"{f.severity}: {f.code}: {f.found}"
            yield from (f"  {key}" for key in f.keys)
            if f.count > len(f.keys):
                yield f"  … ({f.count - len(f.keys)} more)"
            yield f"  expected: {f.expected}"
            yield f"  fix: {f.fix}"

    @property
    def faults(self) -> list[str]:
        """The codes of its faults."""
        return [f.code for f in self.findings if f.severity == "fault"]
