"""A TEMPLATE gives the text of the chat template it was made from, by Go's own engine: real templates, many chats."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import pytest
import trl
from go_engine import DAY, rendered
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import CHATML, TOKENIZERS, make_tokenizer

from slimtune.export.chat_template import turn
from slimtune.export.go_writer import literal
from slimtune.export.infer_template import Chat, messages_of

SHAPES = ["u", "uau", "uauau", "uauauau", "su", "suau", "suauau", "suauauau"]
WORDS = ["Define patience.", " a \n", "{{ .Role }}", '"""', "Größe 嘘 🙂", "system\n\nuser", "<|im_end|>", "[/INST]"]


def jinja(tokenizer, messages, **more):
    more = {"add_generation_prompt": True, **more}
    return tokenizer.apply_chat_template(messages, tokenize=False, **more)


def chats(shapes=SHAPES):
    for n, shape in enumerate(shapes):
        yield messages_of(shape, [f"Word {i}." for i in range(len(shape))])
        yield messages_of(shape, [WORDS[(i + n) % len(WORDS)] for i in range(len(shape))])


@pytest.mark.parametrize("cut", [True, False], ids=["engine adds bos", "template writes bos"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_gos_engine_gives_the_text_of_the_chat_template(name, cut):
    tokenizer = TOKENIZERS[name]
    made = turn(tokenizer, adds_bos=cut)
    assert made.template, made.notes
    asked = [m for m in chats() if made.system or m[0]["role"] != "system"]
    assert made.system or name in ("gemma", "mistral")
    day = datetime.date.fromisoformat(DAY)
    chat = Chat(tokenizer, cut_bos=False)
    got = rendered([{"Template": made.template, "Messages": messages} for messages in asked])
    for messages, theirs in zip(asked, got, strict=True):
        wanted = chat.render(messages, today=day)
        if "strftime_now" not in tokenizer.chat_template:
            assert wanted == jinja(tokenizer, messages)
        bos = tokenizer.bos_token if cut and wanted.startswith(tokenizer.bos_token) else ""
        assert theirs == {"Text": wanted.removeprefix(bos), "Error": ""}


@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma3", "phi3", "mistral", "qwen2_5", "zephyr"])
def test_an_answer_that_is_begun_is_gone_on_with(name):
    tokenizer = TOKENIZERS[name]
    made = turn(tokenizer, adds_bos=False)
    messages = messages_of("uaua", ["Hi.", "Hello.", "Define hope.", "Desire"])
    wanted = jinja(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered([{"Template": made.template, "Messages": messages}])[0]["Text"] == wanted


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "llama3", "phi3"])
@settings(max_examples=6)
@given(data=st.data())
def test_any_chat_that_the_chat_template_takes(name, data):
    tokenizer = TOKENIZERS[name]
    template = turn(tokenizer, adds_bos=False).template
    words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z"), exclude_characters="\ue000\ue001")) | (
        st.sampled_from(WORDS)
    )
    roles = data.draw(st.lists(st.sampled_from("sua"), min_size=1, max_size=7))
    shape = "".join(r for r, _ in itertools.groupby(roles)).rstrip("a") or "u"
    messages = messages_of(shape, [data.draw(words) for _ in shape])
    assert rendered([{"Template": template, "Messages": messages}])[0]["Text"] == jinja(tokenizer, messages)


def test_the_date_is_todays():
    tokenizer = TOKENIZERS["trl llama3_2"]
    made = turn(tokenizer, adds_bos=True)
    today = datetime.date.today()
    messages = messages_of("su", ["Be brief.", "Hi."])
    job = {"Template": made.template, "Messages": messages, "Today": today.isoformat()}
    got, wanted = rendered([job])[0]["Text"], jinja(tokenizer, messages)
    assert wanted.removeprefix("<|begin_of_text|>") == got
    assert f"Today Date: {today:%d %b %Y}\n" in got


@pytest.mark.parametrize("style", ["%Y-%m-%d", "%F", "%d %b %Y", "%B %d, %Y", "%d.%m.%y", "100%% %Y"])
def test_formats_of_a_date(style):
    template = (
        "{{ bos_token }}{{ strftime_now('STYLE') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    made = turn(make_tokenizer(template.replace("STYLE", style), ["<s>", "</s>"]), adds_bos=True)
    got = rendered([{"Template": made.template, "Messages": messages_of("u", ["Hi."])}])[0]["Text"]
    assert got == f"{datetime.date.fromisoformat(DAY):{style}}<user>Hi."


def test_every_chat_template_that_trl_ships():
    """All but those that want a message's content as a list of parts, which a run's rows are not."""
    special = sorted({t for tokenizer in TOKENIZERS.values() for t in tokenizer.all_special_tokens})
    equal, left = 0, []
    for file in sorted(Path(trl.__file__).with_name("chat_templates").glob("*.jinja")):
        tokenizer = make_tokenizer(file.read_text(encoding="utf-8"), special)
        made = turn(tokenizer, adds_bos=False)
        if made.template is None:
            assert "user messages not at all, or not as plain text" in made.notes[0], file.name
            left.append(file.stem)
            continue
        asked = [m for m in chats(["u", "suauau"]) if made.system or m[0]["role"] != "system"]
        chat = Chat(tokenizer, cut_bos=False)
        wanted = [chat.render(messages, today=datetime.date.fromisoformat(DAY)) for messages in asked]
        got = rendered([{"Template": made.template, "Messages": messages} for messages in asked])
        assert got == [{"Text": text, "Error": ""} for text in wanted], file.name
        equal += 1
    print(f"{equal} chat templates of TRL give the same text in Go, {len(left)} are not turned: {', '.join(left)}")
    assert equal > 5 * len(left)


def test_stop_tokens():
    ends = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
    ends |= {"mistral": "</s>", "llama2": "</s>", "deepseekv3": "<｜end▁of▁sentence｜>", "zephyr": "</s>"}
    for name, token in ends.items():
        assert turn(TOKENIZERS[name], adds_bos=True).stops == (token,), name


def note(name: str, word: str, adds_bos: bool = True) -> bool:
    return any(word in n for n in turn(TOKENIZERS[name], adds_bos=adds_bos).notes)


def test_what_the_template_leaves_out_is_named():
    assert note("qwen2_5", "tools are not in the TEMPLATE")
    assert not note("smollm2", "tools")
    assert note("qwen3", "enable_thinking is not in the TEMPLATE")
    assert note("qwen3", "takes thoughts (<think>…</think>) out of earlier answers")
    assert note("smollm2", "Ollama puts <|endoftext|> before the text, which the chat template does not")
    assert not note("smollm2", "Ollama puts", adds_bos=False)
    assert not note("llama3", "Ollama puts")
    assert note("gemma", "refuses system messages")
    assert note("deepseekv3", "written otherwise than by the chat template: user system user")
    assert turn(TOKENIZERS["llama3"], adds_bos=True).notes == ()


def test_a_system_message_is_an_error_where_the_chat_template_refuses_it():
    made = turn(TOKENIZERS["gemma"], adds_bos=True)
    job = {"Template": made.template, "Messages": messages_of("su", ["Be brief.", "Hi."])}
    assert "the chat template refuses system messages" in rendered([job])[0]["Error"]


def test_a_message_of_another_role_is_an_error_and_not_left_out():
    job = {"Template": turn(TOKENIZERS["smollm2"], adds_bos=False).template}
    job["Messages"] = [{"role": "user", "content": "Hi."}, {"role": "tool", "content": "12:00"}]
    assert "knows no messages but system, user and assistant" in rendered([job])[0]["Error"]


TURN = "<{{ m.role }}>{{ m.content }}</s>"
CANNOT = {
    "{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}": "is not the same everywhere",
    "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{% endfor %}": "where what was learnt",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}": "more than once",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "assistant messages not at all",
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}": "refuses a plain conversation|not as plain text",
    "{% for m in messages | reverse %}" + TURN + "{% endfor %}": "order of messages",
    "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('\"', '') }}{% endfor %}": "where what was learnt",
    "{{ strftime_now('%A') }}{% for m in messages %}" + TURN + "{% endfor %}": "'%A', which Ollama cannot",
    "{{ raise_exception('never') }}": "refuses a plain conversation (never)",
    "{% for m in messages %}{{ m.role }": "not valid Jinja",
}  # fmt: skip


@pytest.mark.parametrize("template", CANNOT)
def test_what_cannot_be_turned_is_said_and_not_written(template):
    made = turn(make_tokenizer(template, ["<s>", "</s>"]), adds_bos=True)
    assert made.template is None
    assert any(word in made.notes[0] for word in CANNOT[template].split("|")), made.notes
    assert "no TEMPLATE is written" in made.notes[0]


def test_no_chat_template():
    said = turn(make_tokenizer(None, CHATML), adds_bos=True).notes[0]
    assert said.startswith("the tokenizer has no chat template, or several and no default: no TEMPLATE is written")


@given(text=st.text() | st.text(alphabet='{}"\\-# \n\r\t/*`$.%'))
@settings(max_examples=20)
def test_literal_text(text):
    written = literal(text)
    assert '"""' not in written
    assert rendered([{"Template": written, "Data": {}}]) == [{"Text": text, "Error": ""}]
