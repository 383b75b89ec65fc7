"""The mask on real chat templates, with several turns, system and tools, against oracles that share none of our code.

The walk reads tokens one by one: a turn's are those that `messages[:i + 1]` has beyond `messages[:i]` with the
generation prompt, where both are beginnings of the whole. The marks are those that TRL has put into templates of its
own; what their generation prompt holds is the prompt's, and white space that ends a turn is nobody's, there and here.
"""

from pathlib import Path

import pytest
import trl
from tiny_tokenizer import make_tokenizer, template_text

from slimtune.data.chat_template import encode_chat
from slimtune.data.messages import validate_messages
from slimtune.errors import DataError, SlimtuneError

TRL = Path(trl.__file__).with_name("chat_templates")
CALLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CHATML = ["<|endoftext|>", *CALLS, "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>", "<|eot_id|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
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


def text_of(name):
    return (TRL / f"{name.removeprefix('trl/')}.jinja").read_text() if name.startswith("trl/") else template_text(name)


def talk(name):
    messages, tools = TALKS[name]
    return validate_messages(messages)[0], ({} if tools is None else {"tools": tools})


def ids(tok, messages, more, prompt=False):
    return tok.apply_chat_template(messages, add_generation_prompt=prompt, **more)["input_ids"] if messages else []


def text(tok, messages, more, prompt=False):
    return tok.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **more) if messages else ""


def without_blanks_at_the_end(tok, row, mask):
    """Switch off white space behind the last token of each run that is learned."""
    mask = list(mask)
    for t in reversed(range(len(row))):
        if mask[t] and not (t + 1 < len(row) and mask[t + 1]) and tok.decode([row[t]]).isspace():
            mask[t] = False
    return mask


def walked(tok, messages, more):
    """The mask by a walk over tokens; None where earlier turns are written anew when later ones are there."""
    whole = ids(tok, messages, more)
    mask = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        given, heard = ids(tok, messages[:i], more, prompt=True), ids(tok, messages[: i + 1], more)
        if whole[: len(given)] != given or whole[: len(heard)] != heard:
            return None
        for t in range(len(given), len(heard)):
            mask[t] = True
    return without_blanks_at_the_end(tok, whole, mask)


def marked(tok, oracle, messages, more):
    """The mask of TRL's marks, less what the generation prompt has written; None where TRL has changed the text."""
    found = oracle.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **more)
    row, mask = found["input_ids"], [bool(m) for m in found["assistant_masks"]]
    if row != ids(tok, messages, more):
        return None
    whole = text(tok, messages, more)
    ends = [end for _, end in tok(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, given = text(tok, messages[:i], more), text(tok, messages[:i], more, prompt=True)
            if whole.startswith(given):
                mask = [m and not len(before) < end <= len(given) for m, end in zip(mask, ends, strict=True)]
    return without_blanks_at_the_end(tok, row, mask)


def compared(tok, name, oracle):
    """Compare with an oracle; return whether it had a say."""
    messages, more = talk(name)
    try:
        got = encode_chat(tok, messages, more.get("tools"))
    except SlimtuneError as refusal:  # the template's own limits; `LEAST` says how many are left
        if not any(part in str(refusal) for part in LEFT_OUT):
            raise
        return False
    wanted = oracle(messages, more)
    if wanted is None:
        return False
    tokens = tok.convert_ids_to_tokens(got.input_ids)
    assert got.input_ids == ids(tok, messages, more)
    assert list(zip(tokens, got.supervised, strict=True)) == list(zip(tokens, wanted, strict=True))
    assert any(wanted)
    return True


def by_walk(template, name):
    tok = make_tokenizer(text_of(template), WALKED[template])
    return compared(tok, name, lambda messages, more: walked(tok, messages, more))


def by_marks(template, name):
    tok = make_tokenizer(text_of(f"trl/{template}"), MARKED[template])
    oracle = make_tokenizer(text_of(f"trl/{template}_training"), MARKED[template])
    return compared(tok, name, lambda messages, more: marked(tok, oracle, messages, more))


LEAST = {"two turns": 10, "system": 9, "call": 5, "call said": 4, "calls, the last turn": 4}
"""Templates to be compared at least: one that refuses, or an oracle without a say, is no comparison."""


@pytest.mark.parametrize("name", TALKS)
def test_a_walk_over_tokens(name):
    seen = [template for template in WALKED if by_walk(template, name)]
    assert len(seen) >= LEAST[name], seen


@pytest.mark.parametrize("name", TALKS)
def test_the_marks_of_trl(name):
    seen = [template for template in MARKED if by_marks(template, name)]
    assert len(seen) >= LEAST[name], seen


def test_calls_by_hand():
    """Its prompt opens a thought that no finished turn holds, and it takes arguments as JSON text."""
    tok = make_tokenizer(text_of("trl/deepseekv3"), DEEPSEEK)
    messages, more = talk("call")
    found = encode_chat(tok, messages, more["tools"])
    said = tok.decode([t for t, learned in zip(found.input_ids, found.supervised, strict=True) if learned])
    assert said == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "Blue.<｜end▁of▁sentence｜>"
    )


def test_what_a_template_moves_away_from_its_turn_is_refused():
    messages, more = talk("call said")
    with pytest.raises(DataError, match=r"writes the content of messages\[1\] apart from its calls"):
        encode_chat(make_tokenizer(text_of("trl/gemma4"), GEMMA4), messages, more["tools"])
    # The same, where `<|tool_response>` is plain text to the tokenizer: then the turn seems to go on.
    few = [t for t in GEMMA4 if "tool" not in t]
    with pytest.raises(DataError, match=r"writes messages\[2\] \(tool\) within the turn that called it"):
        encode_chat(make_tokenizer(text_of("trl/gemma4"), few), messages, more["tools"])


def test_calls_that_a_template_leaves_out_are_refused():
    messages, more = talk("call")
    with pytest.raises(DataError, match=r"leaves out tool calls of messages\[1\]"):
        encode_chat(make_tokenizer(text_of("trl/lfm2"), LFM2), messages, more["tools"])
    with pytest.raises(DataError, match="leaves out the tool 'weather'"):
        encode_chat(make_tokenizer(text_of("smollm2"), CHATML), [ASKED, {"role": "assistant", "content": "No."}], TOOLS)
