"""A TEMPLATE gives the text of the chat template it was made from, in Go's own engine: real templates, many chats."""

import datetime
import itertools
import random
import re
from pathlib import Path

import pytest
import trl
from go_engine import DAY, rendered
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import CHATML, TOKENIZERS, make_tokenizer

from slimtune.export.chat_format_inference import DATE_MARKERS, JinjaChatTemplate, make_probe_messages
from slimtune.export.ollama_template import convert_chat_template, escape_go_template_text

SHAPES = ["u", "uau", "uauau", "uauauau", "su", "suau", "suauau", "suauauau"]
WORDS = ["Define patience.", " a \n", "{{ .Role }}", '"""', "Größe 嘘 🙂", "system\n\nuser", "<|im_end|>", "[/INST]"]


def jinja(tokenizer, messages, **options):
    """The chat template's text; a date is the tests' day."""
    text = JinjaChatTemplate(tokenizer, cut_bos=False).render(messages, **options)
    day = datetime.date.fromisoformat(DAY)
    return re.sub("(.*?)".join(DATE_MARKERS), lambda found: day.strftime(found[1]), text)


def go(template, messages):
    return rendered([{"Template": template, "Messages": messages}])[0]


def assert_same_text(tokenizer, cut, shapes=SHAPES):
    """Convert, render in Go and compare; return what was made."""
    made = convert_chat_template(tokenizer, adds_bos=cut)
    assert made.template, made.notes
    chats = []
    for n, shape in enumerate(s for s in shapes if made.takes_system_prompt or s[0] != "s"):
        chats.append(make_probe_messages(shape, [f"Word {i}." for i in range(len(shape))]))
        chats.append(make_probe_messages(shape, [WORDS[(i + n) % len(WORDS)] for i in range(len(shape))]))
    results = rendered([{"Template": made.template, "Messages": messages} for messages in chats])
    for messages, result in zip(chats, results, strict=True):
        expected = jinja(tokenizer, messages)
        bos = tokenizer.bos_token if cut and expected.startswith(tokenizer.bos_token) else ""
        assert result == {"Text": expected.removeprefix(bos), "Error": ""}
    return made


@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_templates(name):
    for cut in (True, False):
        made = assert_same_text(TOKENIZERS[name], cut)
        assert made.takes_system_prompt or name in ("gemma", "mistral")


@pytest.mark.slow
def test_templates_of_trl():
    """All but those that want a message's content as a list of parts, which a run's rows are not."""
    special = sorted({t for tokenizer in TOKENIZERS.values() for t in tokenizer.all_special_tokens})
    equal, unsupported = 0, []
    for file in sorted(Path(trl.__file__).with_name("chat_templates").glob("*.jinja")):
        tokenizer = make_tokenizer(file.read_text(encoding="utf-8"), special)
        made = convert_chat_template(tokenizer, adds_bos=False)
        if made.template is None:
            assert made.notes, file.name
            unsupported.append(file.stem)
            continue
        assert_same_text(tokenizer, cut=False, shapes=["u", "suauau"])
        equal += 1
    print(f"{equal} chat templates of TRL give the same text in Go, {len(unsupported)} are not converted")
    assert equal > 5 * len(unsupported)


PIECES = ["<|a|>", "</s>", "\n", "\n\n", " ", "### ", "User:", "[I]", "{", "{{", '"""', "\u200d", "x", "|", "\r"]
STRIPS = ["C", "C | trim", "C.lstrip()", "C.rstrip()", "C.lstrip('\\n')"]
SYSTEM = ["a message", "a message or a default", "in the first message", "in the last message", "refused", "left out"]


def random_template(seed: int) -> str:
    pick = random.Random(seed)

    def text(least: int = 0, most: int = 3) -> str:
        drawn = "".join(pick.choice(PIECES) for _ in range(pick.randint(least, most)))
        return "{{ " + repr(drawn) + " }}" if drawn else ""

    strips = {role: pick.choice(STRIPS) for role in ("system", "user", "assistant")}
    if pick.random() < 0.4:
        strips = dict.fromkeys(strips, pick.choice(STRIPS[:2]))
    place = pick.choice(SYSTEM)

    def message(role: str, content: str) -> str:
        return text() + "{{ " + strips[role].replace("C", content) + " }}" + text()

    system = message("system", "messages[0].content")
    within = {"in the first message": "loop.first", "in the last message": "loop.last"}.get(place, "false")
    user = "{% if " + within + " and has_system %}" + system + "{% endif %}" + message("user", "m.content")
    body = "{% if m.role == 'user' %}" + user + "{% elif m.role == 'assistant' %}" + message("assistant", "m.content")
    own = place.startswith("a message")
    body += "{% else %}" + message("system", "m.content") + "{% endif %}" if own else "{% endif %}"
    head = pick.choice(["", "{{ bos_token }}"]) + text(0, 1) + "{% set has_system = messages[0].role == 'system' %}"
    if place == "refused":
        head += "{% if has_system %}{{ raise_exception('no system messages') }}{% endif %}"
    if place == "a message or a default":
        head += "{% if not has_system %}" + text(1, 3) + "{% endif %}"
    loop = "messages" if own else "(messages[1:] if has_system else messages)"
    prompt = "{% if add_generation_prompt %}" + text() + "{% endif %}"
    return head + "{% for m in " + loop + " %}" + body + "{% endfor %}" + prompt


@given(seed=st.integers(0, 2**32), cut=st.booleans())
@settings(max_examples=25)
def test_random_templates(seed, cut):
    assert_same_text(make_tokenizer(random_template(seed), ["<s>", "<|a|>", "</s>"]), cut)


@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma3", "mistral", "zephyr"])
def test_begun_answer_is_continued(name):
    messages = make_probe_messages("uaua", ["Hi.", "Hello.", "Define hope.", "Desire"])
    made = convert_chat_template(TOKENIZERS[name], adds_bos=False)
    expected = TOKENIZERS[name].apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert go(made.template, messages)["Text"] == expected


@pytest.mark.parametrize("name", ["smollm2", "llama3", "phi3"])
@settings(max_examples=6)
@given(data=st.data())
def test_any_order_of_roles_and_any_content(name, data):
    template = convert_chat_template(TOKENIZERS[name], adds_bos=False).template
    words = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z"), exclude_characters="\ue000\ue001"))
    roles = data.draw(st.lists(st.sampled_from("sua"), min_size=1, max_size=7))
    shape = "".join(r for r, _ in itertools.groupby(roles)).rstrip("a") or "u"
    messages = make_probe_messages(shape, [data.draw(words | st.sampled_from(WORDS)) for _ in shape])
    assert go(template, messages)["Text"] == jinja(TOKENIZERS[name], messages)


@pytest.mark.parametrize("style", ["%Y-%m-%d", "%F", "%d %b %Y", "%B %d, %Y", "%d.%m.%y", "100%% %Y"])
def test_date_formats(style):
    date = "{{ bos_token }}{{ strftime_now('STYLE') }}".replace("STYLE", style)
    tokenizer = make_tokenizer(
        date + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", ["<s>", "</s>"]
    )
    result = go(convert_chat_template(tokenizer, adds_bos=True).template, make_probe_messages("u", ["Hi."]))
    assert result["Text"] == f"{datetime.date.fromisoformat(DAY):{style}}<user>Hi."


def test_stop_tokens():
    ends = {"smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
    ends |= {"mistral": "</s>", "llama2": "</s>", "deepseekv3": "<｜end▁of▁sentence｜>", "zephyr": "</s>"}
    assert {n: convert_chat_template(TOKENIZERS[n], adds_bos=True).stops for n in ends} == {
        n: (token,) for n, token in ends.items()
    }


NOTES = [
    ("qwen2_5", "no tools", True),
    ("smollm2", "tools", False),
    ("qwen3", "no enable_thinking", True),
    ("qwen3", "removes thoughts", True),
    ("smollm2", "Ollama writes <|endoftext|> before the text", True),
    ("gemma", "refuses system messages", True),
    ("deepseekv3", "differ from the chat template: user system user", True),
]


@pytest.mark.parametrize(("name", "words", "expected"), NOTES)
def test_notes(name, words, expected):
    assert any(words in n for n in convert_chat_template(TOKENIZERS[name], adds_bos=True).notes) is expected
    assert convert_chat_template(TOKENIZERS["llama3"], adds_bos=True).notes == ()


@pytest.mark.parametrize(
    ("name", "roles", "words"),
    [("gemma", ["system", "user"], "refuses system"), ("smollm2", ["user", "tool"], "knows the roles system, user")],
)
def test_messages_that_cannot_be_written(name, roles, words):
    template = convert_chat_template(TOKENIZERS[name], adds_bos=False).template
    assert words in go(template, [{"role": role, "content": "Hi."} for role in roles])["Error"]


MESSAGE = "<{{ m.role }}>{{ m.content }}</s>"
UNSUPPORTED = {
    "{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}": "varies",
    "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{% endfor %}": "inferred form",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}": "more than once",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "assistant messages not at all",
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}": "refuses a plain conversation|not as plain text",
    "{% for m in messages | reverse %}" + MESSAGE + "{% endfor %}": "order of messages",
    "{% for m in messages %}<{{ m.role }}>{{ m.content | replace('\"', '') }}{% endfor %}": "inferred form",
    "{{ strftime_now('%A') }}{% for m in messages %}" + MESSAGE + "{% endfor %}": "'%A', which Ollama cannot",
    "{{ raise_exception('never') }}": "refuses a plain conversation (never)",
    "{% for m in messages %}{{ m.role": "not valid Jinja",
    None: "the tokenizer has no chat template",
}  # fmt: skip


@pytest.mark.parametrize("template", UNSUPPORTED)
def test_unsupported_templates(template):
    made = convert_chat_template(make_tokenizer(template, CHATML), adds_bos=True)
    assert made.template is None
    assert any(words in made.notes[0] for words in UNSUPPORTED[template].split("|")), made.notes
    assert "TEMPLATE" in made.notes[0]


@given(text=st.text() | st.text(alphabet='{}"\\-# \n\r\t/*`$.%'))
@settings(max_examples=20)
def test_literal_text(text):
    literal = escape_go_template_text(text)
    assert '"""' not in literal
    assert rendered([{"Template": literal, "Data": {}}]) == [{"Text": text, "Error": ""}]
