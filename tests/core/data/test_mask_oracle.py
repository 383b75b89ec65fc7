"""The mask on real chat templates, with several turns, system and tools, against oracles that share none of our code.

The walk reads tokens one by one: a turn's are those that `messages[:i + 1]` has beyond `messages[:i]` with the
generation prompt, where both are prefixes of the whole. The marks are those that TRL has put into its templates; what
their generation prompt contains belongs to the prompt. White space that ends a turn belongs to nobody, there and here.
"""

from pathlib import Path

import pytest
import trl
from tiny_tokenizer import GEMMA, make_tokenizer, template_text

from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.errors import DataError, SlimtuneError
from slimtune.extras.message_parsing import parse_messages_and_train_mask

TRL = Path(trl.__file__).with_name("chat_templates")
CALLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CHATML = ["<|endoftext|>", *CALLS, "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>", "<|eot_id|>"]
GEMMA4 = ["<bos>", "<|turn>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<turn|>"]
DEEPSEEK = ["<bos>", "<｜User｜>", "<｜Assistant｜>", *(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end", "output▁begin",
    "output▁end")), "<｜end▁of▁sentence｜>"]  # fmt: skip
GPTOSS = ["<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|end|>",
          "<|return|>"]  # fmt: skip
LFM2 = ["<|startoftext|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|im_start|>", "<|im_end|>"]
COHERE = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"]

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"type": "string", "description": "Its name."},
    "days": {"type": "integer", "description": "How many."}}}}}]  # fmt: skip
ASKED = {"role": "user", "content": "Weather in Rome, please?"}
RESULT = {"role": "tool", "name": "weather", "content": '{"sky": "blue", "wind": 3}'}


def call(**arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


TWO = [("user", "Define patience."), ("assistant", "A minor form of despair."), ("user", "And lie?"),
       ("assistant", "Größe, 嘘 🙂!")]  # fmt: skip
TALKS = {
    "two turns": ([{"role": r, "content": c} for r, c in TWO], None),
    "system": ([{"role": r, "content": c} for r, c in [("system", "Be brief."), *TWO]], None),
    "call": ([ASKED, {"role": "assistant", "tool_calls": [call(city="Rome", days=2)]}, RESULT,
              {"role": "assistant", "content": "Blue."}], TOOLS),
    "call said": ([ASKED, {"role": "assistant", "content": "I look it up.", "tool_calls": [call(city="Rome")]}, RESULT,
                   {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Thanks"},
                   {"role": "assistant", "content": "Bye"}], TOOLS),
    "calls, the last turn": ([ASKED, {"role": "assistant", "tool_calls": [call(city="Rome"), call(city="Ostia")]}],
                             TOOLS),
}  # fmt: skip

WALKED = {
    "smollm2": CHATML, "qwen2_5": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "gemma3": GEMMA, "trl/llama3_1": LLAMA3,
    "trl/llama3_2": LLAMA3, "trl/qwen3_instruct_2507": CHATML, "trl/qwen2_5": CHATML, "trl/lfm2_2_5": LFM2,
    "trl/cohere": COHERE, "trl/cohere2": COHERE, "trl/gemma4_v2": GEMMA4,
}  # fmt: skip
MARKED = {
    "cohere": COHERE, "cohere2": COHERE, "gemma": GEMMA, "gemma3": GEMMA, "gptoss": GPTOSS,
    "lfm2_v2": LFM2, "llama3": LLAMA3, "qwen2_5": CHATML, "qwen3_8": CHATML,
    "qwen3_instruct_2507": CHATML,
}  # fmt: skip
LEFT_OUT = ("refuses these messages", "leaves out", "does not show where the calls")


LEAST = {"two turns": 10, "system": 9, "call": 5, "call said": 4, "calls, the last turn": 4}
"""Templates that are compared at least: one that refuses, or an oracle that does not know, is no comparison."""


def text_of(name):
    return (TRL / f"{name.removeprefix('trl/')}.jinja").read_text() if name.startswith("trl/") else template_text(name)


def talk(name):
    messages, tools = TALKS[name]
    return parse_messages_and_train_mask(messages)[0], ({} if tools is None else {"tools": tools})


def render(tok, messages, more, **options):
    """The text of messages, or their ids."""
    found = tok.apply_chat_template(messages, **more, **options) if messages else ""
    return found if isinstance(found, str) else found["input_ids"]


def drop_last_blanks(tok, row, mask):
    """Switch off white space behind the last token of each run that is learned."""
    for t in reversed(range(len(row))):
        if mask[t] and not (t + 1 < len(row) and mask[t + 1]) and tok.decode([row[t]]).isspace():
            mask[t] = False
    return mask


def walk(template, tok, messages, more):
    """The mask by a walk over tokens; None where the template writes earlier turns differently when others follow."""
    whole = render(tok, messages, more)
    mask = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tok, messages[:i], more, add_generation_prompt=True)
            after = render(tok, messages[: i + 1], more)
            if whole[: len(before)] != before or whole[: len(after)] != after:
                return None
            mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return drop_last_blanks(tok, whole, mask)


def read_marks(template, tok, messages, more):
    """The mask of TRL's marks, without what the generation prompt has written; None where TRL has changed the text."""
    oracle = make_tokenizer(text_of(f"{template}_training"), MARKED[template.removeprefix("trl/")])
    found = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **more)
    row, mask = found["input_ids"], [bool(m) for m in found["assistant_masks"]]
    if row != render(tok, messages, more):
        return None
    whole = render(tok, messages, more, tokenize=False)
    ends = [end for _, end in tok(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tok, messages[:i], more, tokenize=False)
            prompt = render(tok, messages[:i], more, tokenize=False, add_generation_prompt=True)
            if whole.startswith(prompt):
                mask = [m and not len(before) < end <= len(prompt) for m, end in zip(mask, ends, strict=True)]
    return drop_last_blanks(tok, row, mask)


def compare(template, specials, name, oracle):
    """Compare with an oracle; return whether it knows the mask."""
    tok = make_tokenizer(text_of(template), specials)
    messages, more = talk(name)
    try:
        found = encode_chat_with_train_mask(tok, messages, more.get("tools"))
    except SlimtuneError as error:  # the template's own limits; `LEAST` says how many templates are left
        if not any(part in str(error) for part in LEFT_OUT):
            raise
        return False
    expected = oracle(template, tok, messages, more)
    if expected is None:
        return False
    tokens = tok.convert_ids_to_tokens(found.input_ids)
    assert found.input_ids == render(tok, messages, more)
    assert list(zip(tokens, found.supervised, strict=True)) == list(zip(tokens, expected, strict=True))
    return any(expected)


@pytest.mark.parametrize("name", TALKS)
def test_walk_over_tokens(name):
    compared = [template for template, specials in WALKED.items() if compare(template, specials, name, walk)]
    assert len(compared) >= LEAST[name], compared


@pytest.mark.parametrize("name", TALKS)
def test_marks_of_trl(name):
    compared = [t for t, specials in MARKED.items() if compare(f"trl/{t}", specials, name, read_marks)]
    assert len(compared) >= LEAST[name], compared


def test_calls_by_hand():
    """The prompt opens a thought that no finished turn has, and the template takes arguments as JSON text."""
    tok = make_tokenizer(text_of("trl/deepseekv3"), DEEPSEEK)
    messages, more = talk("call")
    found = encode_chat_with_train_mask(tok, messages, more["tools"])
    assert tok.decode([t for t, learned in zip(found.input_ids, found.supervised, strict=True) if learned]) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "Blue.<｜end▁of▁sentence｜>"
    )


NO_CALL = ([ASKED, {"role": "assistant", "content": "No."}], TOOLS)


@pytest.mark.parametrize(
    ("template", "specials", "talk", "message"),
    [
        ("trl/gemma4", GEMMA4, TALKS["call said"], r"writes the content of messages\[1\] apart from its calls"),
        # Where `<|tool_response>` is plain text to the tokenizer, the turn seems to go on.
        ("trl/gemma4", [t for t in GEMMA4 if "tool" not in t], TALKS["call said"],
         r"writes messages\[2\] \(tool\) within the turn that called it"),
        ("trl/lfm2", LFM2, TALKS["call"], r"leaves out tool calls of messages\[1\]"),
        ("smollm2", CHATML, NO_CALL, "leaves out the tool 'weather'"),
    ],
)  # fmt: skip
def test_moved_or_left_out_parts_are_refused(template, specials, talk, message):
    with pytest.raises(DataError, match=message):
        encode_chat_with_train_mask(
            make_tokenizer(text_of(template), specials), parse_messages_and_train_mask(talk[0])[0], talk[1]
        )
