"""Tiny random models of the architectures that matter, the same for the same seed, and inputs for them."""

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 128
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
DECODER = {**_SIZES, "vocab_size": VOCAB, "num_key_value_heads": 2}
ENCODER = {**_SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": 3}


def _seeded(make, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype).eval()


def llama(*, tie: bool = False, dtype: torch.dtype = torch.float64, layers: int = 2, **more) -> nn.Module:
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {**DECODER, **ends, "num_hidden_layers": layers, "tie_word_embeddings": tie} | more
    return _seeded(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), dtype)


def qwen2(dtype: torch.dtype = torch.float64) -> nn.Module:
    return _seeded(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, tie_word_embeddings=True)), dtype)


def gemma2(dtype: torch.dtype = torch.float64) -> nn.Module:
    return _seeded(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8, sliding_window=4)), dtype)


def gemma3(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Its embedding scales the rows it gives; its window of 4 is shorter than the rows, and one layer has none."""
    layers = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4, layer_types=layers)
    return _seeded(lambda: tf.Gemma3ForCausalLM(config), dtype)


def gpt2(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Its layers are Conv1D, which keep their weights as (in, out)."""
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
    return _seeded(lambda: tf.GPT2LMHeadModel(config), dtype)


def t5(dtype: torch.dtype = torch.float64) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return _seeded(
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)), dtype
    )


def bart(dtype: torch.dtype = torch.float64) -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
    config = tf.BartConfig(d_model=16, vocab_size=VOCAB, **sides)
    return _seeded(lambda: tf.BartForConditionalGeneration(config), dtype)


def bert_classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    return _seeded(lambda: tf.BertForSequenceClassification(tf.BertConfig(**ENCODER)), dtype)


def bert_tagger(dtype: torch.dtype = torch.float64) -> nn.Module:
    return _seeded(lambda: tf.BertForTokenClassification(tf.BertConfig(**ENCODER)), dtype)


def bert_encoder(dtype: torch.dtype = torch.float64) -> nn.Module:
    return _seeded(lambda: tf.BertModel(tf.BertConfig(**ENCODER)), dtype)


def roberta_classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Its head has several modules: dense, dropout, out_proj."""
    return _seeded(lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**ENCODER)), dtype)


def distilbert_classifier(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Its head is two modules beside each other: pre_classifier, classifier."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB, "num_labels": 3}
    config = tf.DistilBertConfig(**sizes, max_position_embeddings=64, seq_classif_dropout=0.0)
    return _seeded(lambda: tf.DistilBertForSequenceClassification(config), dtype)


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_ids(count: int, seed: int) -> list[int]:
    return tokens(1, count, seed)[0].tolist()


def run(model: nn.Module, rows: Tensor | None = None) -> Tensor:
    """Return what a model says about some rows: logits, or an encoder's last hidden states."""
    ids = tokens() if rows is None else rows
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def shake(model: nn.Module, seed: int = 5) -> nn.Module:
    """Move every trained parameter off its start, so that an adapter does something; return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise * 0.1).to(parameter.dtype))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}


def same_base(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the base's own parameters are bit for bit those of the snapshot."""
    now = dict(model.named_parameters(remove_duplicate=False))
    return set(before) <= set(now) and all(
        torch.equal(now[n], t) and now[n].dtype == t.dtype for n, t in before.items()
    )
