"""The mask, token by token, on real chat templates.

The oracle is text written by hand: what lies between « and » is to be learned. It shares nothing with the derivation:
each piece is tokenized alone, the ids laid end to end must be those of the template, and the mask is by piece.
"""

import re

import pytest
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data import chat_template
from slimtune.data.chat_template import encode_chat
from slimtune.errors import DataError, ModelError

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
PHI3 = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
MISTRAL = ["<s>", "[INST]", "[/INST]", "</s>"]
LLAMA2 = ["<s>", "</s>"]
GPTOSS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
DEEPSEEK = ["<bos>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]

SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
ONE = [("user", "Define patience."), ("assistant", "A minor form of despair.")]
TWO = [*ONE, ("user", "And lie?"), ("assistant", "Größe, 嘘 🙂!")]
SYSTEM = [("system", "Be brief."), *ONE]
SYSTEM_TWO = [("system", "Be brief."), *TWO]

CASES = {
    "smollm2": (CHATML, ONE, SMOL + "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
        "«A minor form of despair.<|im_end|>»\n"),
    "smollm2 system, two turns": (CHATML, SYSTEM_TWO, "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n«A minor form of despair.<|im_end|>»\n"
        "<|im_start|>user\nAnd lie?<|im_end|>\n<|im_start|>assistant\n«Größe, 嘘 🙂!<|im_end|>»\n"),
    "qwen2_5": (CHATML, ONE, QWEN + "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
        "«A minor form of despair.<|im_end|>»\n"),
    "llama3": (LLAMA3, SYSTEM, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nDefine patience.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A minor form of despair.<|eot_id|>»"),
    "llama3 two turns": (LLAMA3, TWO, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Define patience.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "«A minor form of despair.<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nAnd lie?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Größe, 嘘 🙂!<|eot_id|>»"),
    "gemma": (GEMMA, TWO, "<bos><start_of_turn>user\nDefine patience.<end_of_turn>\n<start_of_turn>model\n"
        "«A minor form of despair.<end_of_turn>»\n<start_of_turn>user\nAnd lie?<end_of_turn>\n<start_of_turn>model\n"
        "«Größe, 嘘 🙂!<end_of_turn>»\n"),
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

PLAIN = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BLANK = [("user", "Hi"), ("assistant", "  A lie. \n")]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def check(tok, turns, marked):
    text = marked.replace("«", "").replace("»", "")
    assert tok.apply_chat_template(messages(turns), tokenize=False) == text
    ids, mask = [], []
    for piece in re.findall(r"«[^»]*»|[^«»]+", marked):
        some = tok(piece.strip("«»"), add_special_tokens=False)["input_ids"]
        ids, mask = ids + some, mask + [piece.startswith("«")] * len(some)
    got = encode_chat(tok, messages(turns))
    assert got.input_ids == tok.apply_chat_template(messages(turns))["input_ids"] == ids
    tokens = tok.convert_ids_to_tokens(ids)
    assert list(zip(tokens, got.supervised, strict=True)) == list(zip(tokens, mask, strict=True))


@pytest.mark.parametrize("trim", [False, True], ids=["", "trimmed offsets"])
@pytest.mark.parametrize("name", CASES)
def test_mask_token_by_token(name, trim):
    specials, turns, marked = CASES[name]
    check(make_tokenizer(template_text(name.split()[0]), specials, trim), turns, marked)


def test_gpt_oss_learns_its_channel_and_both_ends():
    tok = make_tokenizer(template_text("gptoss"), GPTOSS)
    got = encode_chat(tok, messages(TWO))
    said = [t for t, s in zip(got.input_ids, got.supervised, strict=True) if s]
    assert tok.decode(said) == (
        "<|channel|>final<|message|>A minor form of despair.<|end|><|channel|>final<|message|>Größe, 嘘 🙂!<|return|>"
    )


def test_the_last_turn_may_end_differently():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ eos_token if loop.last else '[E]' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    head = "<|im_start|>user\nDefine patience.[E]<|im_start|>assistant\n«A minor form of despair."
    tail = "<|im_start|>user\nAnd lie?[E]<|im_start|>assistant\n«Größe, 嘘 🙂!</s>»"
    check(make_tokenizer(template, ["<|im_start|>", "[E]", "</s>"]), TWO, f"{head}[E]»{tail}")
    # Only the whole conversation is closed: what follows an earlier turn is the next one's header.
    open_ended = template.replace("'[E]'", "''")
    check(make_tokenizer(open_ended, ["<|im_start|>", "</s>"]), TWO, f"{head}»{tail}".replace("[E]", ""))
    alike = open_ended.replace("<|im_start|>{{ m.role }}", "<|{{ m.role }}|>").replace(
        "<|im_start|>assistant", "<|assistant|>"
    )
    marked = "<|user|>\nDefine patience.<|assistant|>\n«A minor form of despair.»"
    marked += "<|user|>\nAnd lie?<|assistant|>\n«Größe, 嘘 🙂!<|end|>»"
    check(make_tokenizer(alike, ["<|user|>", "<|assistant|>", "<|end|>"]), TWO, marked)


def test_a_token_that_begins_in_the_prompt():
    """The prompt ends with a blank that the first token of the answer takes in."""
    template = "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{{ 'A: ' if add_generation_prompt }}"
    turns = [("user", "Define patience."), ("assistant", "a minor form")]
    check(make_tokenizer(template, ["</s>"]), turns, "Define patience.</s>A:« a minor form</s>»")
    rendered = chat_template.RenderedText("A: b]c!", [(3, 4), (5, 6)])
    offsets = [(0, 2), (2, 4), (4, 6), (6, 7)]  # "A:", " b", "]c" holds a piece of the header, "!"
    assert chat_template.mask_tokens(rendered, offsets) == [False, True, False, False]


def test_no_generation_prompt():
    marked = "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
    marked += "«A minor form of despair.<|im_end|>»\n"
    check(make_tokenizer(NO_PROMPT, CHATML), ONE, marked)


def test_end_of_turn_as_plain_text():
    marked = "<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n"
    marked += "«A minor form of despair.<|im_end|>»\n"
    check(make_tokenizer(NO_PROMPT, ["<s>", "</s>"]), ONE, marked)


def test_no_end_of_turn():
    marked = "### user:\nHi there\n### assistant:\n«A lie»\n### user:\nMore?\n### assistant:\n«No»\n"
    turns = [("user", "Hi there"), ("assistant", "A lie"), ("user", "More?"), ("assistant", "No")]
    check(make_tokenizer(PLAIN, ["<s>", "</s>"]), turns, marked)


def test_white_space_of_the_content_is_learned():
    marked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«  A lie. \n<|im_end|>»\n"
    check(make_tokenizer(NO_PROMPT, CHATML), BLANK, marked)
    trimmed = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«A lie.<end_of_turn>»\n"
    check(make_tokenizer(template_text("gemma"), GEMMA), BLANK, trimmed)


@pytest.mark.parametrize("word", ["assistant", "user", "<|im_end|>", "Define patience."])
def test_answers_that_repeat_their_context(word):
    marked = SMOL + f"<|im_start|>user\nDefine patience.<|im_end|>\n<|im_start|>assistant\n«{word}<|im_end|>»\n"
    check(make_tokenizer(template_text("smollm2"), CHATML), [ONE[0], ("assistant", word)], marked)


REWRITING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index > messages | length - 2 %}"
    "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_rewrites_earlier_turns():
    """The system message moves to the last question, so no rendering of earlier turns is a prefix of the whole."""
    turns = [("system", "no"), *[("user", "Ö"), ("assistant", "Ö")] * 3]
    marked = "<s>[INST] Ö[/INST]« Ö</s>»[INST] Ö[/INST]« Ö</s>»[INST] no\n\nÖ[/INST]« Ö</s>»"
    check(make_tokenizer(REWRITING, MISTRAL), turns, marked)


def test_no_chat_template_says_how_to_give_one():
    with pytest.raises(ModelError, match="no chat template") as fault:
        encode_chat(make_tokenizer(None, CHATML), messages(ONE))
    assert "data.chat_template: FILE.jinja" in str(fault.value)
    assert "--set data.chat_template=" in str(fault.value)
    assert fault.value.exit_code == 1


def test_several_templates_without_default():
    with pytest.raises(ModelError, match="several chat templates and no default"):
        encode_chat(make_tokenizer({"rag": PLAIN, "tools": PLAIN}, CHATML), messages(ONE))


def test_the_templates_own_refusals_are_shown():
    tok = make_tokenizer(template_text("gemma"), GEMMA)
    with pytest.raises(DataError, match="refuses these messages: System role not supported"):
        encode_chat(tok, messages(SYSTEM))
    with pytest.raises(DataError, match="roles must alternate"):
        encode_chat(tok, messages([("user", "a"), ("user", "b"), ("assistant", "c")]))


def test_a_message_the_template_leaves_out():
    # A real one: Mixtral's writes the system message into the last message if that is the user's, and else nowhere.
    tok = make_tokenizer(template_text("mixtral_8x22b"), MISTRAL)
    with pytest.raises(DataError, match=r"leaves out messages\[0\] \(system\)"):
        encode_chat(tok, messages(SYSTEM))


def test_templates_that_hide_the_turns():
    for template in (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} ({{ m.content | length }} characters){% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content | length }}{{ m.content | upper }}{% endfor %}",
    ):
        with pytest.raises(ModelError, match="does not show which tokens the assistant produces") as fault:
            encode_chat(make_tokenizer(template, CHATML), messages([("user", "A"), ("assistant", "b")]))
        assert "{% generation %}" in str(fault.value)


def test_broken_template():
    with pytest.raises(ModelError, match="not valid Jinja"):
        encode_chat(make_tokenizer("{% for %}", CHATML), messages(ONE))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is not a fast tokenizer"):
        chat_template.tokenize_texts(Slow(), ["a"])
