"""The format of tool calls is learned from real chat templates, and calls are found in answers."""

import json
from pathlib import Path

import pytest
from hand_run import make_run
from serving_client import make_client

from slimtune.core.foundation.chat_rendering import render_chat_template
from slimtune.serving.tool_calls import ToolCallFormat, detect_json_tool_call_format

TEMPLATES = Path(__file__).parents[1] / "core/data/templates"
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ tools | tojson if tools }} {{ m.content }} [/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASK = [{"role": "user", "content": "How is it in Oslo?"}]
FORMATS = {"qwen2_5": "<tool_call>", "qwen3": "<tool_call>", "mistral": "[TOOL_CALLS]"}


@pytest.fixture
def make_tokenizer(tiny_tokenizer):
    def make(name):
        text = MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text()
        return tiny_tokenizer(chat_template=text)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_a_template_writes_are_read_again(make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    known = detect_json_tool_call_format(tokenizer)
    assert known.opening == FORMATS[name]
    arguments = [{"city": "Oslo {<}"}, {"city": "Łódź", "days": [1, {"a": None}]}]
    calls = [{"type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    prompt, whole = (
        render_chat_template(tokenizer, messages, [WEATHER], add_generation_prompt=messages is ASK)
        for messages in (ASK, [*ASK, turn])
    )
    text = whole[len(prompt) :].replace("<|im_end|>", "") if whole.startswith(prompt) else whole.split("[/INST]")[1]
    before, found = known.parse(text)
    assert before == ("<think>\n\n</think>" if name == "qwen3" else "")
    assert [json.loads(call["function"]["arguments"]) for call in found] == arguments
    assert {call["function"]["name"] for call in found} == {"weather"}


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "deepseekv3", "gptoss"])
def test_templates_without_json_calls(make_tokenizer, name):
    assert detect_json_tool_call_format(make_tokenizer(name)) is None


def test_what_is_no_call_stays_text():
    known = ToolCallFormat("<tool_call>", "</tool_call>", "name", "arguments")
    call = '{"name": "f", "arguments": {}}'
    for text in ("", "no", "<tool_call>", '<tool_call>{"name": "f"}', call, "<tool_call>{" * 9):
        assert known.parse(text) == (text, [])
    bare = ToolCallFormat("", "", "name", "parameters")
    assert bare.parse('{"a": 1}') == ('{"a": 1}', [])
    assert bare.parse(' {"name": "f", "parameters": {}}')[1][0]["function"] == {"name": "f", "arguments": "{}"}
    assert bare.parse('{"name": "f", "parameters": {"x": NaN}}')[1] == []
    assert bare.find_start("Well") == 4
    assert [known.find_start(text) for text in ("abc", "abc<", "abc<tool_call>{", "a<b")] == [3, 3, 3, 3]


def spell(server, text):
    """Let the model answer with this text, byte by byte, and end its turn."""
    tokenizer, runner, told = server.models[0].tokenizer, server.runner, {}
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
    prefill, decode = runner.prefill, runner.decode

    def push(logits, rows):
        for i, row in enumerate(rows):
            told[row] = told.get(row, -1) + 1
            logits[i, ids[told[row]]] = 1e4
        return logits

    def spelled_prefill(row, *tokens):
        logits, batch = prefill(row, *tokens)
        return push(logits, [row]), batch

    runner.prefill, runner.decode = spelled_prefill, lambda batch: push(decode(batch), batch.rows)


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_by_the_client(serve, tmp_path, tiny_llama, tiny_tokenizer, streamed):
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    template = {"chat_template": str(TEMPLATES / "qwen2_5.jinja")}
    server = serve([make_run(tmp_path / "caller", tmp_path / "base", data=template)])
    spell(server, 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
    client = make_client(server)
    answer = client.chat.completions.create(
        model="caller", messages=ASK, tools=[WEATHER], stream=streamed, max_tokens=200, temperature=0
    )
    if streamed:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        reason = chunks[-1].finish_reason
    else:
        text, (call,) = answer.choices[0].message.content, answer.choices[0].message.tool_calls
        reason = answer.choices[0].finish_reason
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
    turn = {"role": "assistant", "content": None, "tool_calls": [{"id": call.id, "type": "function", "function": {
        "name": "weather", "arguments": call.function.arguments}}]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    again = client.chat.completions.create(model="caller", messages=[*ASK, turn, result], tools=[WEATHER], max_tokens=1)
    assert again.usage.prompt_tokens > 0
