"""A tiny byte-level tokenizer, trained here, that takes any real chat template and its special tokens."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "core/data/templates"
TEXT = [
    "Define the word. A definition is a polite lie told by a lexicographer who was paid to tell it.",
    "Answer in one sentence, please: what is patience? A minor form of despair, disguised as a virtue.",
    "system user assistant model final analysis message think be brief You are helpful",
]

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI3 = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
MISTRAL = ["<s>", "[INST]", "[/INST]", "</s>"]
GPT_OSS = ["<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
DEEPSEEK = ["<bos>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
"""The special tokens that the templates of a family write."""


def make_tokenizer(template: str | None, specials: list[str], trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are `specials`: the first is bos, the last is eos."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=specials[0], eos_token=specials[-1])
    made.add_special_tokens({"additional_special_tokens": specials})
    made.chat_template = template
    return made


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


SMOLLM2_TOK = make_tokenizer(template_text("smollm2"), CHATML)
GEMMA_TOK = make_tokenizer(template_text("gemma"), GEMMA)
