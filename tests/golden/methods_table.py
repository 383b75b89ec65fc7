"""What is compared with peft: one line for each config that both have, run on Llama, Qwen2, GPT-2 and Gemma 2 shapes.

    id: (config class, settings[, settings by base][, notes])

`{"gpt2": {...}}` replaces settings on one base, None leaves the base out. A note, told where peft is no measure:
`"start"`: our adapter starts with other random numbers than peft's for one seed;
`"fp32"`: peft keeps the adapter in fp32 whatever the base is, so that ours is rounded to it before peft reads it.
"""

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
GPT2 = {"gpt2": {"target_modules": ["c_attn"]}}
NO_CONV1D = {"gpt2": None}

TABLE: dict[str, tuple] = {
    "lora": ("LoraConfig", ALL),
    "lora+dora": ("LoraConfig", {"use_dora": True, "lora_alpha": 16, **ALL}),
    "lora+dora-embedding": (
        "LoraConfig",
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        {"gpt2": {"target_modules": ["wte"]}, "qwen2": None},
    ),
    "lora+bias": ("LoraConfig", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, GPT2),
    "lora+orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal", **ALL}),
    "lora+tokens": ("LoraConfig", {"trainable_token_indices": [117, 3, 17, 27], **ALL}),
    "trainable_tokens+random": ("TrainableTokensConfig", {"token_indices": [117, 3, 17], "init_weights": False}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [117, 3, 17, 27]}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}, "fp32"),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 5}, "fp32"),
    "ia3": ("IA3Config", {}),
    "ia3-outputs": (
        "IA3Config",
        {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []},
        {"gpt2": {"target_modules": ["c_attn", "c_fc"]}},
    ),
    "ln_tuning": ("LNTuningConfig", {}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 4, **ALL}, NO_CONV1D),
    # Scales that fp32 holds: peft rounds LoHa's to it.
    "loha+wide": ("LoHaConfig", {"r": 6, "alpha": 12, "rank_pattern": {"q_proj": 1}, **ALL}, NO_CONV1D),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 4, **ALL}, NO_CONV1D),
    "lokr+whole": ("LoKrConfig", {"r": 8, "init_weights": "lycoris", **ALL}, NO_CONV1D),
    "lokr+both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 3, **ALL}, NO_CONV1D),
    "miss": ("MissConfig", {"r": 5, **ALL}, NO_CONV1D),
    "miss+random": ("MissConfig", {"r": 4, "init_weights": False, **ALL}, NO_CONV1D),
    "miss+mini": ("MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini", **ALL}, NO_CONV1D),
    "miss+bat": ("MissConfig", {"r": 4, "init_weights": "bat", **ALL}, NO_CONV1D),
    "vera": ("VeraConfig", {"r": 16}),
    "vera-all": ("VeraConfig", {"r": 8, "init_weights": False, **ALL}),
    "vera-bias": ("VeraConfig", {"r": 4, "bias": "vera_only"}),
    "vera-seed": ("VeraConfig", {"save_projection": False, "projection_prng_key": 7, "d_initial": 0.5}),
    "hira": ("HiraConfig", {"r": 8}),
    "hira-all": ("HiraConfig", {"r": 4, "init_weights": "gaussian", **ALL}),
    "hira-embedding": (
        "HiraConfig",
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"gpt2": {"target_modules": ["wte", "c_attn"]}, "gemma2": None},
    ),  # see docs/methods/hira.md
    "shira": ("ShiraConfig", {"r": 4}, {"gpt2": None}),  # peft's takes no Conv1D
    "shira-all": ("ShiraConfig", {"r": 3, "random_seed": 5, "init_weights": False, **ALL}, {"gpt2": None}),
    "oft": ("OFTConfig", {"oft_block_size": 8, **ALL}, NO_CONV1D),
    "oft+terms": ("OFTConfig", {"oft_block_size": 7, "num_cayley_neumann_terms": 3, **ALL}, NO_CONV1D),
    "oft+exact": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **ALL}, NO_CONV1D),
    "oft+shared": ("OFTConfig", {"r": 4, "oft_block_size": 0, "block_share": True, **ALL}, NO_CONV1D),
    # Bounds that fp32 holds: peft rounds COFT's to it.
    "oft+coft": ("OFTConfig", {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.5, **QV}, NO_CONV1D),
    "oft+embedding": (
        "OFTConfig",
        {"oft_block_size": 8, "target_modules": ["embed_tokens"]},
        {"gpt2": {"target_modules": ["wte"]}, "qwen2": None},
    ),
    "adalora": ("AdaLoraConfig", {"init_r": 5, "target_r": 2, "total_step": 9, **ALL}),
    "adalora+random": ("AdaLoraConfig", {"init_lora_weights": False, "total_step": 9, **QV}, GPT2),
}
