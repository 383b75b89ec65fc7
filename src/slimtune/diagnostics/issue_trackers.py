"""Where the programs that people tune and serve with collect reports of errors."""

import re
from urllib.parse import urlencode

REPOSITORIES = {
    "accelerate": "huggingface/accelerate",
    "auto_gptq": "AutoGPTQ/AutoGPTQ",
    "awq": "casper-hansen/AutoAWQ",
    "axolotl": "axolotl-ai-cloud/axolotl",
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "datasets": "huggingface/datasets",
    "deepspeed": "deepspeedai/DeepSpeed",
    "exllamav2": "turboderp-org/exllamav2",
    "flash_attn": "Dao-AILab/flash-attention",
    "gptqmodel": "ModelCloud/GPTQModel",
    "huggingface_hub": "huggingface/huggingface_hub",
    "liger_kernel": "linkedin/Liger-Kernel",
    "litgpt": "Lightning-AI/litgpt",
    "llama_cpp": "abetlen/llama-cpp-python",
    "llamafactory": "hiyouga/LlamaFactory",
    "llmcompressor": "vllm-project/llm-compressor",
    "mlx_lm": "ml-explore/mlx-lm",
    "mlx_vlm": "Blaizzy/mlx-vlm",
    "optimum": "huggingface/optimum",
    "peft": "huggingface/peft",
    "safetensors": "huggingface/safetensors",
    "sglang": "sgl-project/sglang",
    "swift": "modelscope/ms-swift",
    "tokenizers": "huggingface/tokenizers",
    "torchao": "pytorch/ao",
    "torchtune": "meta-pytorch/torchtune",
    "transformers": "huggingface/transformers",
    "trl": "huggingface/trl",
    "unsloth": "unslothai/unsloth",
    "unsloth_zoo": "unslothai/unsloth",
    "vllm": "vllm-project/vllm",
    "xformers": "facebookresearch/xformers",
}
"""The repository on GitHub of each module."""
_MODULE = re.compile(r"(?:site|dist)-packages[/\\]([A-Za-z_]\w{0,40})[/\\]")
_MOST_QUERY = 100


def make_issue_search_or_none(text: str) -> str | None:
    """Return the address of a search among the reports of the program whose code raised an error; None if unknown.

    That is the last module of a traceback that has a repository here; the search is for the words of its last line.
    Paths are left out: they are the user's own.
    """
    modules = [module for module in _MODULE.findall(text) if module in REPOSITORIES]
    lines = [line for line in text.splitlines() if re.match(r"[\w.]{3,80}(?:Error|Exception)\b", line.strip())]
    if not modules or not lines:
        return None
    words = [word for word in lines[-1].strip().split() if not re.search(r"[/\\]|0x", word)]
    query = urlencode({"q": "is:issue " + " ".join(words)[:_MOST_QUERY]})
    return f"https://github.com/{REPOSITORIES[modules[-1]]}/issues?{query}"
