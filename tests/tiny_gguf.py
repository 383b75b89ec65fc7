"""Write a tiny Llama as a GGUF file, as llama.cpp's converter would: names, permuted q and k rows, vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    pre: str = "smollm",
    scaling: str | None = None,
    rope_freqs: np.ndarray | None = None,
    drop: str | None = None,
    poison: bool = False,
    quantize: bool = False,
) -> Path:
    """Write `model` (LlamaForCausalLM, fp32) and `tokenizer` (byte-level) to `path`.

    `drop` leaves one tensor out, `poison` puts a NaN into another, `scaling` and `rope_freqs` add rotary scaling,
    `quantize` stores the matrices in 8 bits.
    """
    import gguf

    config = model.config
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny")
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_rope_freq_base(config.rope_parameters["rope_theta"])
    w.add_rope_dimension_count(config.head_dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_vocab_size(config.vocab_size)
    if scaling:
        w.add_string("llama.rope.scaling.type", scaling)
    add_vocabulary(w, tokenizer, pre, len(tokenizer))
    w.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = weight.numpy().copy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if poison and "down_proj" in name:
            array[0, 0] = np.nan
        kind = gguf.GGMLQuantizationType.Q8_0 if quantize and array.ndim == 2 else None
        stored = array if kind is None else gguf.quants.quantize(array, kind)
        w.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=kind)
    if rope_freqs is not None:
        w.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    finish_gguf(w)
    return path


def add_vocabulary(w: Any, tokenizer: Any, pre: str, size: int) -> None:
    """Add the tokens of a byte-level tokenizer, and unused ones up to `size`."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    unused = [f"<unused{i}>" for i in range(size - len(tokens))]
    special = {*tokenizer.all_special_tokens, *unused}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens + unused)
    w.add_token_types([3 if token in special else 1 for token in tokens + unused])
    w.add_token_merges(["Ġ a", "Ġ 1"])
    w.add_bos_token_id(tokenizer.bos_token_id)
    w.add_eos_token_id(tokenizer.eos_token_id)
    w.add_pad_token_id(tokenizer.pad_token_id)
    w.add_add_bos_token(False)


def finish_gguf(writer: Any) -> None:
    """Write what a `GGUFWriter` has collected."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny_base(path: Path, tiny_llama: Any, tiny_tokenizer: Any, **config: Any) -> Path:
    """Write a tiny Llama and its tokenizer, made by the fixtures of these names."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])  # what the merges above make
    return write_gguf(path, tiny_llama(vocab_size=261, head_dim=8, **config), tokenizer)
