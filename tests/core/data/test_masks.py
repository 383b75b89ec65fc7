"""The mask, token by token, on real chat templates and on odd ones.

The oracle is text written by hand: the model learns what is between « and ». It shares nothing with the derivation:
each piece is tokenized alone, the ids together must be those of the template, and the mask is by piece.
"""

import re

import pytest
from tiny_tokenizer import CHATML, DEEPSEEK, GEMMA, GPT_OSS, MISTRAL, PHI3, make_tokenizer, template_text

from slimtune.core.data import chat_template
from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.errors import DataError, ModelError

LLAMA2 = ["<s>", "</s>"]
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ONE = [("user", "Define patience."), ("assistant", "A minor form of despair.")]
TWO = [*ONE, ("user", "And lie?"), ("assistant", "Größe, 嘘 🙂!")]
SYSTEM = [("system", "Be brief."), *ONE]
SYSTEM_TWO = [("system", "Be brief."), *TWO]

CASES = {
    "smollm2": (CHATML, ONE, SMOL + "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
        "«A minor form of despair.<|im_end|>»\n"),
    "gemma3 system": (GEMMA, SYSTEM, "<bos><start_of_turn>user\nBe brief.\n\nDefine patience.<end_of_turn>\n"
        "<start_of_turn>model\n«A minor form of despair.<end_of_turn>»\n"),
    # No generation prompt, and white space after the end-of-turn token.
    "mistral": (MISTRAL, TWO, "<s>[INST] Define patience. [/INST]«A minor form of despair.</s>» "
        "[INST] And lie? [/INST]«Größe, 嘘 🙂!</s>» "),
    # The blank before the answer is the model's to say: the prompt ends with [/INST].
    "mixtral_8x7b": (MISTRAL, SYSTEM_TWO, "<s> [INST] Be brief.\n\nDefine patience. [/INST]"
        "« A minor form of despair.</s>» [INST] And lie? [/INST]« Größe, 嘘 🙂!</s>»"),
    "mixtral_8x22b": (MISTRAL, TWO, "<s>[INST] Define patience.[/INST]« A minor form of despair.</s>»"
        "[INST] And lie?[/INST]« Größe, 嘘 🙂!</s>»"),
    "llama2": (LLAMA2, SYSTEM_TWO, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nDefine patience. [/INST]"
        "« A minor form of despair. </s>»<s>[INST] And lie? [/INST]« Größe, 嘘 🙂! </s>»"),
    # It closes the whole conversation with a second token, which no turn ends with.
    "phi3": (PHI3, SYSTEM_TWO, "<|system|>\nBe brief.<|end|>\n<|user|>\nDefine patience.<|end|>\n<|assistant|>\n"
        "«A minor form of despair.<|end|>»\n<|user|>\nAnd lie?<|end|>\n<|assistant|>\n«Größe, 嘘 🙂!<|end|>»\n"
        "<|endoftext|>"),
    # The empty thought is the model's to say in the last turn, and is not written in earlier ones.
    "qwen3": (CHATML, TWO, "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
        "«A minor form of despair.<|im_end|>»\n<|im_start|>user\nAnd lie?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\nGröße, 嘘 🙂!<|im_end|>»\n"),
    "qwen3 thoughts": (CHATML, [("user", "Hi"), ("assistant", "<think>a</think>B."), ("user", "C?"),
        ("assistant", "<think>d</think>E.")], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "«B.<|im_end|>»\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n«<think>\nd\n</think>\n\nE.<|im_end|>»\n"),
    # {% generation %}: as the template marks it, less the white space after the end.
    "qwen3_training": (CHATML, TWO, "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\nA minor form of despair.<|im_end|>»\n<|im_start|>user\nAnd lie?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nGröße, 嘘 🙂!<|im_end|>»\n"),
    # The prompt opens a thought which the finished turn does not hold.
    "deepseekv3": (DEEPSEEK, TWO, "<bos><｜User｜>Define patience.<｜Assistant｜>"
        "«A minor form of despair.<｜end▁of▁sentence｜>»<｜User｜>And lie?<｜Assistant｜>"
        "«Größe, 嘘 🙂!<｜end▁of▁sentence｜>»"),
}  # fmt: skip

# Templates written here: (template, special tokens, turns, marked text)
PLAIN = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ONE_MARKED = (
    "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n«A minor form of despair.<|im_end|>»\n"
)
BLANK = [("user", "Hi"), ("assistant", "  A lie. \n")]
OWN_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ eos_token if loop.last else '[E]' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN_TURNS = OWN_END.replace("'[E]'", "''")
ROLE_TOKENS = OPEN_TURNS.replace("<|im_start|>{{ m.role }}", "<|{{ m.role }}|>").replace(
    "<|im_start|>assistant", "<|assistant|>"
)
TWO_MARKED = (
    "<|im_start|>user\nDefine patience.[E]<|im_start|>assistant\n«A minor form of despair.[E]»"
    "<|im_start|>user\nAnd lie?[E]<|im_start|>assistant\n«Größe, 嘘 🙂!</s>»"
)
OPEN_MARKED = TWO_MARKED.replace("[E]", "")
ROLE_MARKED = (
    "<|user|>\nDefine patience.<|assistant|>\n«A minor form of despair.»"
    "<|user|>\nAnd lie?<|assistant|>\n«Größe, 嘘 🙂!<|end|>»"
)
BLANK_PROMPT = (
    "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{{ 'A: ' if add_generation_prompt }}"
)
# The system message moves to the last question, so no rendering of earlier turns is a prefix of the whole.
REWRITING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index > messages | length - 2 %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ODD = {
    "last turn ends differently": (OWN_END, ["<|im_start|>", "[E]", "</s>"], TWO, TWO_MARKED),
    "only the last turn ends": (OPEN_TURNS, ["<|im_start|>", "</s>"], TWO, OPEN_MARKED),
    "roles are tokens": (ROLE_TOKENS, ["<|user|>", "<|assistant|>", "<|end|>"], TWO, ROLE_MARKED),
    # The prompt ends with a blank that the first token of the answer takes in.
    "token begins in the prompt": (BLANK_PROMPT, ["</s>"], [ONE[0], ("assistant", "a minor form")],
        "Define patience.</s>A:« a minor form</s>»"),
    "no generation prompt": (NO_PROMPT, CHATML, ONE, ONE_MARKED),
    "end of turn is plain text": (NO_PROMPT, ["<s>", "</s>"], ONE, ONE_MARKED),
    "no end of turn": (PLAIN, ["<s>", "</s>"], [("user", "Hi there"), ("assistant", "A lie"), ("user", "More?"),
        ("assistant", "No")], "### user:\nHi there\n### assistant:\n«A lie»\n### user:\nMore?\n### assistant:\n«No»\n"),
    "white space is learned": (NO_PROMPT, CHATML, BLANK,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«  A lie. \n<|im_end|>»\n"),
    "template trims": (template_text("gemma"), GEMMA, BLANK,
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«A lie.<end_of_turn>»\n"),
    "earlier turns change": (REWRITING, MISTRAL, [("system", "no"), *[("user", "Ö"), ("assistant", "Ö")] * 3],
        "<s>[INST] Ö[/INST]« Ö</s>»[INST] Ö[/INST]« Ö</s>»[INST] no\n\nÖ[/INST]« Ö</s>»"),
    **{f"answer repeats {word}": (template_text("smollm2"), CHATML, [ONE[0], ("assistant", word)],
        CASES["smollm2"][2].replace("A minor form of despair.", word))
        for word in ("assistant", "user", "<|im_end|>", "Define patience.")},
}  # fmt: skip


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def assert_mask(tok, turns, marked):
    text = marked.replace("«", "").replace("»", "")
    assert tok.apply_chat_template(messages(turns), tokenize=False) == text
    ids, mask = [], []
    for piece in re.findall(r"«[^»]*»|[^«»]+", marked):
        some = tok(piece.strip("«»"), add_special_tokens=False)["input_ids"]
        ids, mask = ids + some, mask + [piece.startswith("«")] * len(some)
    found = encode_chat_with_train_mask(tok, messages(turns))
    assert found.input_ids == tok.apply_chat_template(messages(turns))["input_ids"] == ids
    tokens = tok.convert_ids_to_tokens(ids)
    assert list(zip(tokens, found.supervised, strict=True)) == list(zip(tokens, mask, strict=True))


@pytest.mark.parametrize("trim", [False, True], ids=["", "trimmed offsets"])
@pytest.mark.parametrize("name", CASES)
def test_real_template(name, trim):
    specials, turns, marked = CASES[name]
    assert_mask(make_tokenizer(template_text(name.split()[0]), specials, trim), turns, marked)


@pytest.mark.parametrize("name", ODD)
def test_odd_template(name):
    template, specials, turns, marked = ODD[name]
    assert_mask(make_tokenizer(template, specials), turns, marked)


def test_gpt_oss_learns_its_channel_and_both_ends():
    tok = make_tokenizer(template_text("gptoss"), GPT_OSS)
    found = encode_chat_with_train_mask(tok, messages(TWO))
    assert tok.decode([t for t, s in zip(found.input_ids, found.supervised, strict=True) if s]) == (
        "<|channel|>final<|message|>A minor form of despair.<|end|><|channel|>final<|message|>Größe, 嘘 🙂!<|return|>"
    )


def test_token_with_a_piece_of_the_header():
    rendered = chat_template.RenderedText("A: b]c!", [(3, 4), (5, 6)])
    offsets = [(0, 2), (2, 4), (4, 6), (6, 7)]  # "A:", " b", "]c" contains a piece of the header, "!"
    assert chat_template.make_supervised_mask(rendered, offsets) == [False, True, False, False]


UNUSABLE = {
    "none": (None, CHATML, ONE, ModelError, r"no chat template[^\0]*data.chat_template: NAME[^\0]*--chat-template"),
    "several": ({"a": PLAIN, "b": PLAIN}, CHATML, ONE, ModelError, "several chat templates and no default"),
    "broken": ("{% for %}", CHATML, ONE, ModelError, "not valid Jinja"),
    "with its length": (PLAIN.replace("}\n", "} ({{ m.content | length }} characters)"), CHATML, ONE, ModelError,
        r"not show which tokens the assistant produces[^\0]*{% generation %}"),
    "upper case": (PLAIN.replace("m.content", "m.content | upper"), CHATML, [("user", "A"), ("assistant", "b")],
        ModelError, "not show which tokens the assistant produces"),
    "system": (template_text("gemma"), GEMMA, SYSTEM, DataError, "refuses these messages: System role not supported"),
    "two questions": (template_text("gemma"), GEMMA, [ONE[0], *ONE], DataError, "roles must alternate"),
    # Mixtral's writes the system message into the last message if that is the user's, and else nowhere.
    "left out": (template_text("mixtral_8x22b"), MISTRAL, SYSTEM, DataError, r"leaves out messages\[0\] \(system\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_template(name):
    template, specials, turns, error, message = UNUSABLE[name]
    with pytest.raises(error, match=message):
        encode_chat_with_train_mask(make_tokenizer(template, specials), messages(turns))


def test_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="tokenizer"):
        chat_template.tokenize_rendered_texts(object(), ["a"])
