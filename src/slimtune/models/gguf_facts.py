"""What a GGUF file says that transformers does not carry over, and what must therefore be set right or refused.

Two things would otherwise be wrong without a word:

- **Rotary scaling.** Llama 3.1 and later store their frequencies' divisors as the tensor `rope_freqs.weight`, which
  transformers skips: positions would be off. The settings that produce exactly those divisors are put into the config.
  Any other scaling is refused.
- **How text is split before merging.** A vocabulary whose numbers were split digit by digit is given GPT-2's splitting.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from ..errors import ModelError

log = logging.getLogger(__name__)

# llama.cpp's names of the vocabularies that it splits as `\p{N}` followed by GPT-2's expression, and of those that it
# splits by GPT-2's expression alone.
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "modern-bert", "mellum"}
_LLAMA3_FACTORS = (8.0, 32.0)


@dataclass(frozen=True)
class GgufFacts:
    """What was read from a GGUF file's header.

    Args:
        elements: numbers in all weight tensors, rotary tables apart.
        splitting: llama.cpp's name of the pre-tokenizer, "" where the vocabulary is not byte-level BPE.
        scaling: the rotary scaling named in the metadata, "" for none.
        rope_divisors: `(head_dim / 2,)` divisors of the rotary frequencies, where the file has them.
        rope_tables: other rotary tables in the file.
    """

    elements: int
    splitting: str
    scaling: str
    rope_divisors: torch.Tensor | None
    rope_tables: tuple[str, ...]


def read_facts(path: Path) -> GgufFacts:
    """Read the header of a GGUF file.

    Raises:
        Exception: whatever the reader stumbles over in a damaged file.
    """
    from gguf import GGUFReader  # heavy, optional

    reader = GGUFReader(str(path))
    fields = reader.fields
    tables = {t.name: t for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))}
    own = tables.pop("rope_freqs.weight", None)
    scaling = next((fields[k].contents() for k in fields if k.endswith(".rope.scaling.type")), "none")
    byte_level = "tokenizer.ggml.model" in fields and fields["tokenizer.ggml.model"].contents() == "gpt2"
    splitting = fields["tokenizer.ggml.pre"].contents() if byte_level and "tokenizer.ggml.pre" in fields else ""
    skipped = {*tables, "rope_freqs.weight"}
    return GgufFacts(
        elements=sum(int(t.n_elements) for t in reader.tensors if t.name not in skipped),
        splitting=str(splitting),
        scaling="" if scaling == "none" else str(scaling),
        rope_divisors=None if own is None else torch.tensor(own.data.reshape(-1).tolist(), dtype=torch.float64),
        rope_tables=tuple(tables),
    )


def set_rope(config: Any, facts: GgufFacts, name: str) -> None:
    """Put the file's rotary scaling into `config`.

    Raises:
        ModelError: the file scales positions in a way that could not be reproduced.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        return
    if facts.rope_divisors is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for factor in _LLAMA3_FACTORS:
            theirs = llama3_divisors(float(rope.get("rope_theta", 10000.0)), head_dim, factor)
            if theirs.shape == facts.rope_divisors.shape and torch.allclose(theirs, facts.rope_divisors, rtol=1e-4):
                config.rope_parameters = {
                    **rope,
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
                return
    if facts.rope_divisors is not None or facts.rope_tables or facts.scaling:
        what = facts.scaling or ", ".join(facts.rope_tables) or "a table of frequencies"
        raise ModelError(
            f"{name} scales its rotary positions ({what}) in a way that transformers does not read from a GGUF file",
            "plain rotary positions, or Llama 3's scaling",
            "use the model's Hugging Face checkpoint (a folder or a Hub id) instead of its GGUF file",
        )


def llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """Return Llama 3's `(head_dim / 2,)` divisors of the rotary frequencies: 1 for short waves, `factor` for long."""
    old, low, high = 8192.0, 1.0, 4.0
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def set_splitting(tokenizer: Any, facts: GgufFacts, name: str) -> None:
    """Make the tokenizer split text as the vocabulary was made; says aloud when that is not known."""
    if facts.splitting in _DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif facts.splitting and facts.splitting not in _PLAIN | _known_splits():
        log.warning(
            "%s splits text as %r, which transformers does not know: tokens may differ from llama.cpp's",
            name,
            facts.splitting,
        )


def _known_splits() -> set[str]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs  # not in every 5.x
    except ImportError:
        return set()
    return set(getattr(theirs, "GGUF_PRE_TOKENIZER_SPLITS", {}))
