"""What is compared with peft: one line for each config that both have, run on Llama, Qwen2, GPT-2 and Gemma 2 shapes.

    id: (config class, settings[, settings by base][, notes])

`{"gpt2": {...}}` replaces settings on one base, None leaves the base out. A note, told where peft is no measure:
`"start"`: our adapter starts with other random numbers than peft's for one seed.
"""

from __future__ import annotations

QV = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}
GPT2 = {"gpt2": {"target_modules": ["c_attn"]}}

TABLE: dict[str, tuple] = {
    "lora": ("LoraConfig", ALL),
}
