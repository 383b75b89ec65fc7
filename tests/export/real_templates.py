"""Real chat templates, each with the special tokens it writes: from tests/data/templates and from TRL."""

from pathlib import Path

import trl
from tiny_tokenizer import CHATML, DEEPSEEK, GEMMA, LLAMA3, MISTRAL, PHI3, make_tokenizer, template_text

__all__ = ["CHATML", "TOKENIZERS", "make_tokenizer"]

OURS = {
    "smollm2": CHATML, "qwen2_5": CHATML, "qwen3": CHATML, "qwen3_training": CHATML, "llama3": LLAMA3, "gemma": GEMMA,
    "gemma3": GEMMA, "phi3": PHI3, "mistral": MISTRAL, "mixtral_8x7b": MISTRAL, "mixtral_8x22b": MISTRAL,
    "llama2": ["<s>", "</s>"], "deepseekv3": DEEPSEEK,
    "gptoss": ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
}  # fmt: skip
TRL = {
    "llama3_1": LLAMA3, "llama3_2": LLAMA3, "phi3_5": PHI3, "qwen3_instruct_2507": CHATML, "qwen3_8": CHATML,
    "lfm2": CHATML, "glm4moe": CHATML, "nemotron_3_nano": CHATML, "gemma4": ["<bos>", "<|turn>", "<turn|>"],
    "cohere": ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"],
    "deepseek_r1_distill": DEEPSEEK,
}  # fmt: skip
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Like Mistral's of 2024, with every content stripped of whitespace.
LAST = (
    "{{ bos_token }}{% set has_system = messages[0].role == 'system' %}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and has_system %}{{ messages[0].content | trim }}\n\n{% endif %}"
    "{{ m.content | trim }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)


def tokenizers():
    for name, special in OURS.items():
        yield name, make_tokenizer(template_text(name), special)
    for name, special in TRL.items():
        file = Path(trl.__file__).with_name("chat_templates") / f"{name}.jinja"
        if file.is_file():
            yield f"trl {name}", make_tokenizer(file.read_text(encoding="utf-8"), special)
    yield "system last", make_tokenizer(LAST, MISTRAL)
    yield "zephyr", make_tokenizer(ZEPHYR, ["<s>", "<|user|>", "<|system|>", "<|assistant|>", "</s>"])


TOKENIZERS = dict(tokenizers())
