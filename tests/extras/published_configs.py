"""Field names and numbers of configs that five trainers publish as examples; names of rows and folders are ours."""

LF = "https://github.com/hiyouga/LLaMA-Factory/blob/main/examples/"
AX = "https://github.com/axolotl-ai-cloud/axolotl/blob/main/examples/"
SW = "https://github.com/modelscope/ms-swift/blob/main/examples/train/"
TRL = "https://github.com/huggingface/trl/blob/main/"
MLX = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/examples/lora_config.yaml"

_LF = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "do_train": True, "finetuning_type": "lora",
    "lora_target": "all", "dataset": "rows.jsonl", "template": "llama3", "cutoff_len": 2048, "max_samples": 1000,
    "overwrite_cache": True, "preprocessing_num_workers": 16, "output_dir": "out", "logging_steps": 10,
    "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000,
}  # fmt: skip
_LF_EVAL = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
_EMPTY = dict.fromkeys(("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model",
                        "resume_from_checkpoint"))  # fmt: skip
_AX = {
    "load_in_8bit": False, "load_in_4bit": False, "val_set_size": 0.05, "output_dir": "out", "adapter": "lora",
    "lora_dropout": 0.05, "sample_packing": True, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine",
    "learning_rate": 2e-4, "bf16": "auto", "gradient_checkpointing": True, "logging_steps": 1, "weight_decay": 0.0,
    "flash_attention": True, "saves_per_epoch": 1, **_EMPTY,
}  # fmt: skip
_CHAT = [{"path": "rows.jsonl", "type": "chat_template", "field_messages": "messages",
          "message_property_mappings": {"role": "role", "content": "content"}}]  # fmt: skip
_SW = {
    "train_type": "lora", "num_train_epochs": 1, "per_device_train_batch_size": 1, "learning_rate": "1e-4",
    "lora_rank": 8, "lora_alpha": 32, "gradient_accumulation_steps": 16, "save_total_limit": 2, "logging_steps": 5,
    "model_author": "me", "model_name": "mine",
}  # fmt: skip
_TRL = {
    "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True, "eval_strategy": "steps", "output_dir": "out",
}  # fmt: skip

YAML = {
    "llama-factory": {
        f"{LF}extras/galore/llama3_full_sft.yaml": _LF | {
            "stage": "sft", "finetuning_type": "full", "use_galore": True, "galore_layerwise": True,
            "galore_target": "all", "galore_rank": 128, "galore_scale": 2.0, "pure_bf16": True, "learning_rate": 1e-5},
        f"{LF}train_lora/qwen2_5vl_lora_sft.yaml": _LF | {
            "stage": "sft", "image_max_pixels": 262144, "video_max_pixels": 16384, "template": "qwen2_vl"},
        f"{LF}train_lora/llama3_lora_sft.yaml": _LF | {"stage": "sft", "lora_rank": 8, "trust_remote_code": True},
        f"{LF}train_lora/llama3_lora_dpo.yaml": _LF | {
            "stage": "dpo", "lora_rank": 8, "pref_beta": 0.1, "pref_loss": "sigmoid", "learning_rate": 5e-6},
        f"{LF}train_lora/llama3_lora_kto.yaml": _LF | _LF_EVAL | {
            "stage": "kto", "pref_beta": 0.1, "learning_rate": 5e-6},
        f"{LF}train_lora/llama3_lora_pretrain.yaml": {k: v for k, v in _LF.items() if k != "template"} | {
            "stage": "pt", "lora_rank": 8},
        f"{LF}train_qlora/llama3_lora_sft_otfq.yaml": _LF | _LF_EVAL | {
            "stage": "sft", "quantization_bit": 4, "quantization_method": "bitsandbytes"},
        f"{LF}extras/loraplus/llama3_lora_sft.yaml": _LF | _LF_EVAL | {"stage": "sft", "loraplus_lr_ratio": 16.0},
        f"{LF}extras/pissa/llama3_lora_sft.yaml": _LF | {
            "stage": "sft", "lora_rank": 8, "pissa_init": True, "pissa_iter": 16, "pissa_convert": True,
            "dataloader_num_workers": 4, "save_only_model": False, "report_to": "none"},
    },
    "axolotl": {
        f"{AX}mistral/lora.yml": _AX | {
            "base_model": "mistralai/Mistral-7B-v0.1", "hub_model_id": "me/mine", "load_in_8bit": True,
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "lora_target_linear": True, "sequence_len": 8192,
            "lora_target_modules": ["q_proj", "v_proj"], "loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3},
        f"{AX}qwen3/qlora-fsdp.yaml": _AX | {
            "base_model": "Qwen/Qwen3-8B", "load_in_4bit": True, "adapter": "qlora", "datasets": _CHAT,
            "optimizer": "adamw_torch_4bit", "gradient_checkpointing": "offload", "fsdp_version": 2,
            "fsdp_config": {"offload_params": True}, "save_first_step": True, "activation_offloading": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        f"{AX}gemma3/gemma-3-270m-qlora.yml": _AX | {
            "base_model": "google/gemma-3-270m-it", "load_in_4bit": True, "adapter": "qlora", "lora_r": 32,
            "lora_alpha": 16, "lora_dropout": 0, "lora_target_linear": True, "sequence_len": 2048, "num_epochs": 1,
            "ddp_find_unused_parameters": True, "chat_template": "gemma3", "eot_tokens": ["<end_of_turn>"],
            "datasets": [{"path": "rows.jsonl", "type": "chat_template", "field_messages": "conversations",
                          "message_property_mappings": {"role": "from", "content": "value"}}],
            "val_set_size": 0.0, "unfrozen_parameters": [r"^lm_head\..*"], "eval_sample_packing": False,
            "gradient_accumulation_steps": 4, "micro_batch_size": 1, "tf32": True, "warmup_ratio": 0.1,
            "gradient_checkpointing_kwargs": {"use_reentrant": False}, "evals_per_epoch": None},
        f"{AX}llama-3/lora-1b.yml": _AX | {
            "base_model": "NousResearch/Llama-3.2-1B", "strict": False, "val_set_size": 0.1,
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "dataset_prepared_path": "cache", "lora_r": 16,
            "lora_alpha": 32, "lora_model_dir": None, "pad_to_sequence_len": True, "sequence_len": 2048,
            "lora_target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"],
            "optimizer": "adamw_8bit", "micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 1,
            "train_on_inputs": False, "group_by_length": False, "loss_watchdog_threshold": 5.0,
            "loss_watchdog_patience": 3, "warmup_steps": 10, "evals_per_epoch": 4, "fsdp": None,
            "special_tokens": {"pad_token": "<|end_of_text|>"}},
        f"{AX}llama-3/qlora-1b-kto.yaml": _AX | {
            "base_model": "meta-llama/Llama-3.2-1B", "load_in_4bit": True, "rl": "kto", "rl_beta": 0.5,
            "kto_desirable_weight": 0.2, "datasets": [{"path": "rows.jsonl", "type": "llama3.ultra", "split": "train"}],
            "adapter": "qlora", "lora_r": 32, "lora_alpha": 64, "lora_target_linear": True, "sequence_len": 2048,
            "sample_packing": False, "remove_unused_columns": False, "micro_batch_size": 2, "num_epochs": 1,
            "warmup_steps": 20, "eval_max_new_tokens": 128, "eval_table_size": None},
        f"{AX}llama-3/instruct-dpo-lora-8b.yml": _AX | {
            "base_model": "meta-llama/Meta-Llama-3-8B-Instruct", "model_type": "LlamaForCausalLM", "rl": "dpo",
            "tokenizer_type": "AutoTokenizer", "load_in_8bit": True, "chat_template": "llama3", "lora_r": 32,
            "datasets": [{"path": "rows.jsonl", "type": "chat_template.default", "field_chosen": "chosen"}],
            "lora_alpha": 16, "lora_target_linear": True, "sequence_len": 4096, "sample_packing": False,
            "micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 4, "warmup_steps": 10},
        f"{AX}deepcogito/cogito-v1-preview-llama-3B-lora.yml": _AX | {
            "base_model": "deepcogito/cogito-v1-preview-llama-3B", "load_in_8bit": True, "datasets": _CHAT,
            "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "sequence_len": 4096, "num_epochs": 4,
            "micro_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 10, "evals_per_epoch": 4},
        f"{AX}archived/tiny-llama/lora.yml": _AX | {
            "base_model": "TinyLlama/TinyLlama_v1.1", "load_in_8bit": True, "lora_r": 32, "lora_alpha": 16,
            "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "lora_target_linear": True, "num_epochs": 4,
            "sequence_len": 4096, "micro_batch_size": 2, "attn_implementation": "flash_attention_2",
            "warmup_ratio": 0.1},
    },
    "trl": {
        f"{TRL}examples/cli_configs/example_config.yaml": {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset_name": "me/rows", "report_to": "none",
            "learning_rate": 1e-4, "lr_scheduler_type": "cosine"},
    },
    "mlx-lm": {
        MLX: {
            "model": "Qwen/Qwen3-0.6B", "train": True, "fine_tune_type": "lora", "training_mode": "normal",
            "optimizer": "adamw", "data": "rows", "seed": 0, "num_layers": 16, "batch_size": 4, "iters": 1000,
            "val_batches": 25, "learning_rate": 1e-5, "steps_per_report": 10, "steps_per_eval": 200,
            "resume_adapter_file": None, "adapter_path": "adapters", "save_every": 100, "test": False,
            "test_batches": 100, "max_seq_length": 2048, "grad_checkpoint": False,
            "lora_parameters": {"keys": ["self_attn.q_proj", "self_attn.v_proj"], "rank": 8, "scale": 20.0,
                                "dropout": 0.0}},
    },
}  # fmt: skip
"""By trainer and address."""
COMMANDS = {
    "llama-factory": {
        "https://github.com/flashlin/Samples/blob/main/torch-qa/LLaMA-Factory/f1.sh": ("python src/train_bash.py", {
            "stage": "sft", "model_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "do_train": True, "dataset": "rows",
            "template": "default", "finetuning_type": "lora", "lora_target": "q_proj,v_proj,lm_head",
            "lora_alpha": 16, "lora_rank": 64, "lora_dropout": 0.1, "resume_lora_training": "True",
            "output_dir": "out", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "cosine", "logging_steps": 10, "save_steps": 5, "learning_rate": "1e-5",
            "num_train_epochs": 1.0, "quantization_bit": 4, "plot_loss": True}),
    },
    "mlx-lm": {
        "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md": ("python -m mlx_lm lora", {
            "model": "Qwen/Qwen3-0.6B", "train": True, "data": "rows", "batch-size": 1, "num-layers": 8, "iters": 600,
            "learning-rate": "1e-5", "mask-prompt": True, "grad-checkpoint": True, "fine-tune-type": "dora"}),
    },
    "ms-swift": {
        f"{SW}streaming/streaming.sh": ("swift sft", {k: v for k, v in _SW.items() if k != "num_train_epochs"} | {
            "model": "Qwen/Qwen2.5-7B-Instruct", "dataset": "me/rows#1000", "streaming": "true", "max_steps": 1000,
            "eval_steps": 100, "save_steps": 100}),
        "https://github.com/puzhiyuan/AiO/blob/main/train/ms-swift/sft/full/train_ddp.sh": ("swift sft", {
            "model": "Qwen/Qwen3-8B", "train_type": "full", "dataset": "rows.jsonl", "torch_dtype": "bfloat16",
            "attn_impl": "flash_attn", "num_train_epochs": 5, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4, "learning_rate": "1e-4", "eval_steps": 50, "save_steps": 100,
            "max_length": 2048, "warmup_ratio": 0.05, "output_dir": "out", "report_to": "swanlab",
            "swanlab_project": "p", "swanlab_token": "t", "swanlab_exp_name": "n", "swanlab_mode": "cloud"}),
        "https://github.com/YyWooo/LMME3DHF/blob/main/main/train_LLM.sh": ("swift sft", _SW | {
            "model": "Qwen/Qwen2.5-7B-Instruct", "dataset": ["a.json", "b.json"], "val_dataset": ["c.json", "d.json"],
            "split_dataset_ratio": 0, "torch_dtype": "bfloat16", "freeze_vit": "True", "target_modules": "all-linear",
            "eval_steps": 3200, "max_length": 2048, "system": "'You help.'", "weight_decay": 0.01}),
        f"{SW}early_stop/lora_sft.sh": ("swift sft", _SW | {
            "model": "Qwen/Qwen2.5-7B-Instruct", "dataset": ["me/rows#500", "me/others#500"], "max_length": 2048,
            "split_dataset_ratio": 0.1, "torch_dtype": "bfloat16", "per_device_eval_batch_size": 1,
            "early_stop_interval": 3, "target_modules": "all-linear", "eval_steps": 50, "save_steps": 50,
            "output_dir": "out", "system": "'You help.'", "warmup_ratio": 0.05, "dataloader_num_workers": 4,
            "metric_for_best_model": "loss"}),
        f"{SW}base_to_chat/lora.sh": ("swift sft", _SW | {
            "model": "Qwen/Qwen2.5-1.5B", "dataset": ["me/rows#500", "me/others"], "torch_dtype": "bfloat16",
            "template": "default", "num_train_epochs": 10, "gradient_accumulation_steps": "$(expr 16 / $count)",
            "target_modules": "all-linear", "max_length": 2048, "output_dir": "out", "deepspeed": "zero2"}),
        f"{SW}dora/train.sh": ("swift sft", _SW | {
            "model": "Qwen/Qwen2-7B-Instruct", "use_dora": "true", "dataset": "me/rows#1000", "eval_steps": 100}),
    },
    "trl": {
        "https://github.com/lun2hang/playgemma_textcls_sft/blob/main/gemma2b_sft_chat.sh": (
            "accelerate launch --num_processes=1 ../trl/examples/scripts/sft.py", {
                "model_name": "google/gemma-2b", "dataset_name": "me/rows", "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1, "learning_rate": "2e-4", "save_steps": 20000, "use_peft": True,
                "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj", "k_proj"], "load_in_4bit": True,
                "output_dir": "out"}),
        f"{TRL}trl/scripts/kto.py": ("python trl/scripts/kto.py", {
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "dataset_name": "me/rows", "learning_rate": "5e-7",
            "per_device_train_batch_size": 8, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "eval_steps": 500,
            "gradient_accumulation_steps": 1, "output_dir": "out", "warmup_steps": 0.1, "logging_first_step": True,
            "use_peft": True, "load_in_4bit": True, "lora_target_modules": "all-linear", "lora_r": 16,
            "lora_alpha": 16}),
        f"{TRL}trl/scripts/sft.py": ("python trl/scripts/sft.py", _TRL | {
            "model_name_or_path": "Qwen/Qwen2-0.5B", "dataset_name": "me/rows", "learning_rate": "2.0e-5",
            "packing": True, "eos_token": "'<|im_end|>'", "eval_steps": 100, "push_to_hub": True}),
        f"{TRL}trl/scripts/sft.py#lora": ("python trl/scripts/sft.py", _TRL | {
            "model_name_or_path": "Qwen/Qwen2-0.5B", "dataset_name": "me/rows", "learning_rate": "2.0e-4",
            "packing": True, "eos_token": "'<|im_end|>'", "use_peft": True, "lora_r": 32, "lora_alpha": 16}),
        f"{TRL}trl/scripts/dpo.py": ("trl dpo", _TRL | {
            "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "dataset_name": "me/rows", "dataset_streaming": True,
            "learning_rate": "5.0e-6", "logging_steps": 25, "no_remove_unused_columns": True, "use_peft": True,
            "lora_r": 32, "lora_alpha": 16, "report_to": "wandb"}),
    },
}  # fmt: skip
"""By trainer and address: the command, and its arguments."""
