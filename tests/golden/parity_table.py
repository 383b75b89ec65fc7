"""What is compared with peft: `METHODS`, run on Llama, Qwen2, GPT-2 and Gemma 2, and `LORA`, each on one base.

    METHODS  id: (config class, settings[, settings by base][, "fp32"])
    LORA     id: (base, settings)

`{"gpt2": {...}}` replaces settings on one base, None leaves the base out. `"fp32"`: peft keeps the adapter in fp32
whatever the base is, so that ours is rounded to it before peft reads it.
"""

from models_zoo import bert_classifier, bert_encoder, bert_tagger, distilbert_classifier, gemma2, gpt2, llama, qwen2, t5

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
GPT2 = {"gpt2": {"target_modules": ["c_attn"]}}
NO_GPT2 = {"gpt2": None}  # peft's takes no Conv1D

METHODS = {
    "lora": ("LoraConfig", ALL),
    "lora+dora": ("LoraConfig", {"use_dora": True, "lora_alpha": 16, **ALL}),
    "lora+dora-embedding": ("LoraConfig", {"use_dora": True, "target_modules": ["embed_tokens"]},
                            {"gpt2": {"target_modules": ["wte"]}, "qwen2": None}),
    "lora+bias": ("LoraConfig", {"lora_bias": True, **QV}, GPT2),
    "lora+orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal", **ALL}),
    "lora+tokens": ("LoraConfig", {"trainable_token_indices": [117, 3, 17, 27], **ALL}),
    "trainable_tokens+random": ("TrainableTokensConfig", {"token_indices": [117, 3, 17], "init_weights": False}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [117, 3, 17, 27]}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}, "fp32"),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, "fp32"),
    "ia3": ("IA3Config", {}),
    "ia3-outputs": ("IA3Config", {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []},
                    {"gpt2": {"target_modules": ["c_attn", "c_fc"]}}),
    "ln_tuning": ("LNTuningConfig", {}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 4, **ALL}, NO_GPT2),
    # Scales that fp32 holds: peft rounds LoHa's to it.
    "loha+wide": ("LoHaConfig", {"r": 6, "alpha": 12, "rank_pattern": {"q_proj": 1}, **ALL}, NO_GPT2),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 4, **ALL}, NO_GPT2),
    "lokr+whole": ("LoKrConfig", {"r": 8, "init_weights": "lycoris", **ALL}, NO_GPT2),
    "lokr+both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 3, **ALL}, NO_GPT2),
    "miss": ("MissConfig", {"r": 5, **ALL}, NO_GPT2),
    "miss+random": ("MissConfig", {"r": 4, "init_weights": False, **ALL}, NO_GPT2),
    "miss+mini": ("MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini", **ALL}, NO_GPT2),
    "miss+bat": ("MissConfig", {"r": 4, "init_weights": "bat", **ALL}, NO_GPT2),
    "vera": ("VeraConfig", {"r": 16}),
    "vera-all": ("VeraConfig", {"r": 8, "init_weights": False, **ALL}),
    "vera-bias": ("VeraConfig", {"r": 4, "bias": "vera_only"}),
    "vera-seed": ("VeraConfig", {"save_projection": False, "projection_prng_key": 7, "d_initial": 0.5}),
    "hira": ("HiraConfig", {"r": 8}),
    "hira-all": ("HiraConfig", {"r": 4, "init_weights": "gaussian", **ALL}),
    "hira-embedding": ("HiraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},  # see docs/methods/hira.md
                       {"gpt2": {"target_modules": ["wte", "c_attn"]}, "gemma2": None}),
    "shira": ("ShiraConfig", {"r": 4}, NO_GPT2),
    "shira-all": ("ShiraConfig", {"r": 3, "random_seed": 5, "init_weights": False, **ALL}, NO_GPT2),
    "oft": ("OFTConfig", {"oft_block_size": 8, **ALL}, NO_GPT2),
    "oft+terms": ("OFTConfig", {"oft_block_size": 7, "num_cayley_neumann_terms": 3, **ALL}, NO_GPT2),
    "oft+exact": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **ALL}, NO_GPT2),
    "oft+shared": ("OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True, **ALL}, NO_GPT2),
    # Bounds that fp32 holds: peft rounds COFT's to it.
    "oft+coft": ("OFTConfig", {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.5, **QV}, NO_GPT2),
    "oft+embedding": ("OFTConfig", {"oft_block_size": 8, "target_modules": ["embed_tokens"]},
                      {"gpt2": {"target_modules": ["wte"]}, "qwen2": None}),
    "adalora": ("AdaLoraConfig", {"init_r": 5, "target_r": 2, "total_step": 9, **ALL}),
    "adalora+random": ("AdaLoraConfig", {"init_lora_weights": False, "total_step": 9, **QV}, GPT2),
}  # fmt: skip
BASES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "gemma2": gemma2}


def tied():
    return llama(tie=True)


LORA = {
    "plain": (llama, {}),
    "all-linear": (llama, {"r": 4, "lora_alpha": 16, **ALL}),
    "rslora": (llama, {"use_rslora": True, "lora_alpha": 16}),
    "patterns": (llama, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {
        r"layers\.1\.self_attn\.v_proj": 20, "q_proj": 6}, **QV}),
    "nested-patterns": (llama, {"target_modules": ["q_proj", "v_proj", "up_proj"], "rank_pattern": {
        "0.self_attn.q_proj": 2, "q_proj": 5, "mlp.up_proj": 7}, "use_rslora": True}),
    "two-modules-to-save": (llama, {"modules_to_save": ["lm_head", "embed_tokens"], **QV}),
    "norms-to-save": (llama, {"modules_to_save": ["input_layernorm", "norm"], **QV}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-head-saved": (tied, {"modules_to_save": ["lm_head"], **QV}),
    "tied-embedding": (tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head-adapted": (tied, {"target_modules": ["lm_head"]}),
    "tied-tokens": (tied, {"trainable_token_indices": [3, 5], "ensure_weight_tying": True, **ALL}),
    "exclude": (llama, {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"], **ALL}),
    "layers": (llama, {"layers_to_transform": [1], "layers_pattern": "layers", **QV}),
    "regex": (llama, {"target_modules": r".*layers\.0\..*(q|up)_proj"}),
    "gaussian": (llama, {"init_lora_weights": "gaussian"}),
    "random": (llama, {"init_lora_weights": False}),
    "gpt2": (gpt2, {}),
    "gpt2-bias-all": (gpt2, {"bias": "all", **ALL}),
    "gpt2-bias-lora": (gpt2, {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "gpt2-positions": (gpt2, {"target_modules": ["wpe", "wte", "c_attn"]}),
    "qwen2": (qwen2, {"bias": "lora_only"}),
    "gemma2": (gemma2, ALL),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all": (t5, {"task_type": "SEQ_2_SEQ_LM", "use_rslora": True, **ALL}),
    "bert-seq-cls": (bert_classifier, {"task_type": "SEQ_CLS"}),
    "bert-seq-cls-bias": (bert_classifier, {"task_type": "SEQ_CLS", "bias": "all", **ALL}),
    "distilbert-seq-cls": (distilbert_classifier, {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    "bert-token-cls": (bert_tagger, {"task_type": "TOKEN_CLS", "r": 2}),
    "bert-encoder": (bert_encoder, {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "dense"]}),
}  # fmt: skip


def settings_on(name, base):
    """A method's settings on a base, None where it is left out."""
    _, settings, *more = METHODS[name]
    own = next((m.get(base, {}) for m in more if isinstance(m, dict)), {})
    return None if own is None else {"task_type": "CAUSAL_LM", **settings, **own}
