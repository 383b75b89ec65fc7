"""Write tiny random models under the names of the Hub repositories that PEFT's tests load, as a Hugging Face cache.

    python build_hub.py HUB_FOLDER        real `peft` must be importable: it writes the adapters

Classes and module names are those of the originals, sizes and weights are not. A test that needs an original's weights
or vocabulary fails here for real PEFT, too, and so is in no list of its passes.
"""

import hashlib
import sys
from pathlib import Path

import peft
import tokenizers
import torch
import transformers

HUB = Path(sys.argv[1]).resolve()
P, T, H = "peft-internal-testing/", "trl-internal-testing/", "hf-internal-testing/"
TEXT = """Paris is the capital of France. say hello to the world, and be helpful. Classify if the tweet is a complaint
or not. Twitter Life is what happens; The quick brown fox jumps over the lazy dog. Be yourself; everyone else is already
taken. attribution positive negative 0 1 2 3 4 5 6 7 8 9 A man a plan a canal Panama What is the meaning of life"""

IDS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LONG = {"max_position_embeddings": 512}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 256, **IDS}
WIDE_OPT = {**OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 12}
GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, **IDS}
LLAMA = {**IDS, **HEADS, **LONG, "hidden_size": 16, "intermediate_size": 64, "num_key_value_heads": 4}
BERT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
BERT |= {"vocab_size": 1000, **LONG}
DEBERTA = {**BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
DEBERTA |= {"type_vocab_size": 0}
T5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_decoder_layers": 5}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 4}
BART |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 4, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GPT_OSS = {"hidden_size": 8, "intermediate_size": 32, "head_dim": 2, "sliding_window": 64, **HEADS, **EXPERTS}
GPT_OSS |= {"layer_types": ["sliding_attention", "full_attention"]}
LLAMA4 = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "head_dim": 4,
    "num_local_experts": 2,
}
LLAMA4 |= {"num_experts_per_tok": 1, "attention_chunk_size": 64, **HEADS, **LONG}
QWEN_MOE = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4}
NEMOTRON = {"hidden_size": 32, "intermediate_size": 64, "hybrid_override_pattern": "M*-", "head_dim": 8, "n_groups": 1}
NEMOTRON |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, **HEADS, "num_hidden_layers": 3}
NEOX = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
GEMMA3 = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "sliding_window": 64}
CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}

MODELS = [
    ("OPTForCausalLM", "OPTConfig", OPT, [f"{x}tiny-random-OPTForCausalLM" for x in (P, H)]),
    ("OPTForCausalLM", "OPTConfig", {**OPT, "vocab_size": 1100}, [f"{P}tiny-random-OPTForCausalLM-extended-vocab"]),
    ("OPTForCausalLM", "OPTConfig", WIDE_OPT, [f"{P}opt-125m", "facebook/opt-125m"]),
    (
        *("GPT2LMHeadModel", "GPT2Config", GPT2),
        [f"{H}tiny-random-gpt2", f"{P}tiny-random-gpt2", f"{P}tiny-random-GPT2LMHeadModel"],
    ),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_embd": 48, "n_layer": 12}, ["gpt2", "openai-community/gpt2"]),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}, [f"{P}tiny-random-GPTJForCausalLM"]),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**IDS, **NEOX, **LONG}, [f"{P}tiny-random-GPTNeoXForCausalLM"]),
    (
        *("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 5, "n_head": 4, **IDS}),
        [f"{P}tiny-random-BloomForCausalLM"],
    ),
    (
        *("LlamaForCausalLM", "LlamaConfig", LLAMA),
        [f"{P}tiny-random-LlamaForCausalLM-safetensors", *(f"{x}tiny-random-LlamaForCausalLM" for x in (P, T, H))],
    ),
    ("LlamaForSequenceClassification", "LlamaConfig", LLAMA, [f"{T}tiny-LlamaForSequenceClassification-3.2"]),
    (
        *("MistralForCausalLM", "MistralConfig"),
        {**IDS, **HEADS, **LONG, "hidden_size": 32, "intermediate_size": 37},
        [f"{H}tiny-random-MistralForCausalLM"],
    ),
    (
        *("Qwen2ForCausalLM", "Qwen2Config", {**IDS, **HEADS, **LONG, "hidden_size": 8, "intermediate_size": 32}),
        [f"{P}tiny-dummy-qwen2", "Qwen/Qwen2-0.5B"],
    ),
    (
        *("Qwen3ForCausalLM", "Qwen3Config"),
        {**IDS, **HEADS, **LONG, "hidden_size": 8, "intermediate_size": 32, "head_dim": 8},
        [f"{T}tiny-Qwen3ForCausalLM"],
    ),
    (
        *("Gemma3ForCausalLM", "Gemma3TextConfig", {**IDS, **HEADS, **LONG, **GEMMA3}),
        [f"{H}tiny-random-Gemma3ForCausalLM"],
    ),
    ("BertModel", "BertConfig", BERT, [f"{x}tiny-random-BertModel" for x in (P, H)]),
    ("BertForSequenceClassification", "BertConfig", BERT, [f"{P}tiny-random-BertForSequenceClassification"]),
    (
        *("BertForMaskedLM", "BertConfig", {**BERT, "num_hidden_layers": 12}),
        ["bert-base-uncased", "google-bert/bert-base-uncased"],
    ),
    ("RobertaModel", "RobertaConfig", {**BERT, **IDS}, [f"{P}tiny-random-RobertaModel"]),
    (
        *("RobertaForSequenceClassification", "RobertaConfig", {**BERT, **IDS}),
        [f"{P}tiny-random-RobertaForSequenceClassification"],
    ),
    ("DebertaModel", "DebertaConfig", DEBERTA, [f"{P}tiny-random-DebertaModel"]),
    ("DebertaV2Model", "DebertaV2Config", DEBERTA, [f"{P}tiny-random-DebertaV2Model"]),
    (
        *("T5ForConditionalGeneration", "T5Config", T5),
        [
            *(f"{P}tiny-random-{x}" for x in ("t5", "T5ForConditionalGeneration")),
            f"{P}tiny-random-T5ForConditionalGeneration-calibrated",
            *("t5-base", "google-t5/t5-base", "google/flan-t5-small", "google/flan-t5-base", "t5-small"),
        ],
    ),
    (
        *("BartForConditionalGeneration", "BartConfig", {**IDS, **LONG, **BART}),
        [f"{P}tiny-random-BartForConditionalGeneration"],
    ),
    ("GptOssForCausalLM", "GptOssConfig", {**IDS, **GPT_OSS}, [f"{T}tiny-GptOssForCausalLM"]),
    ("Llama4ForCausalLM", "Llama4TextConfig", {**IDS, **LLAMA4}, [f"{T}tiny-Llama4ForCausalLM"]),
    (
        *("MixtralForCausalLM", "MixtralConfig"),
        {**IDS, **HEADS, **EXPERTS, "hidden_size": 32, "intermediate_size": 64},
        [f"{H}Mixtral-tiny"],
    ),
    (
        *("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**IDS, **HEADS, **QWEN_MOE, "num_experts_per_tok": 2}),
        [f"{T}tiny-Qwen3MoeForCausalLM", f"{H}tiny-qwen3-moe"],
    ),
    ("NemotronHForCausalLM", "NemotronHConfig", {**IDS, **NEMOTRON}, [f"{T}tiny-NemotronHForCausalLM-nano"]),
    (
        *("CLIPTextModel", "CLIPTextConfig"),
        {**CLIP, "vocab_size": 1000, "max_position_embeddings": 77, "projection_dim": 32},
        [f"{P}tiny-clip-text-2"],
    ),
    ("ResNetForImageClassification", "ResNetConfig", RESNET, [f"{P}tiny-random-ResNetForImageClassification"]),
]
OPT_BASE = f"{P}tiny-random-OPTForCausalLM"
ADAPTERS = [  # repository, base, class of the base, task, revision
    (f"{P}tiny-OPTForCausalLM-lora", OPT_BASE, "OPTForCausalLM", "CAUSAL_LM", "main"),
    (f"{P}tiny-opt-lora-revision", OPT_BASE, "OPTForCausalLM", "CAUSAL_LM", "test"),
    (f"{P}tiny_OPTForFeatureExtraction-lora", OPT_BASE, "OPTModel", "FEATURE_EXTRACTION", "main"),
    (f"{P}tiny_OPTForQuestionAnswering-lora", OPT_BASE, "OPTForQuestionAnswering", "QUESTION_ANS", "main"),
    (f"{P}tiny_OPTForSequenceClassification-lora", OPT_BASE, "OPTForSequenceClassification", "SEQ_CLS", "main"),
    (
        *(f"{P}tiny_GPT2ForTokenClassification-lora", f"{P}tiny-random-gpt2"),
        *("GPT2ForTokenClassification", "TOKEN_CLS", "main"),
    ),
    (f"{P}tiny_T5ForSeq2SeqLM-lora", f"{P}tiny-random-t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", "main"),
    (f"{P}gpt2-lora-random", "gpt2", "GPT2LMHeadModel", "CAUSAL_LM", "main"),
    (f"{P}opt-125m-dummy-lora", f"{P}opt-125m", "OPTForCausalLM", "CAUSAL_LM", "main"),
    (f"{P}tiny-random-BertModel-lora", f"{P}tiny-random-BertModel", "BertModel", "FEATURE_EXTRACTION", "main"),
]


def make_snapshot_folder(repo: str, revision: str = "main") -> Path:
    """Return the folder of a repository's files, as the Hub's client lays them out."""
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    root = HUB / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make_tokenizer():
    special = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*special.values()], initial_alphabet=letters
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    names = {f"{k}_token": v for k, v in special.items()} | {"cls_token": "<s>", "sep_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def main() -> None:
    tokenizer = make_tokenizer()
    for model_class, config_class, config, repos in MODELS:
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
        for repo in repos:
            model.save_pretrained(make_snapshot_folder(repo))
            if model_class != "ResNetForImageClassification":
                tokenizer.save_pretrained(make_snapshot_folder(repo))
    for repo, base, model_class, task, revision in ADAPTERS:
        torch.manual_seed(0)
        model = getattr(transformers, model_class).from_pretrained(make_snapshot_folder(base))
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(make_snapshot_folder(repo, revision))


if __name__ == "__main__":
    main()
