"""Chat templates made up at random: each is turned, and Go's engine gives its text."""

from __future__ import annotations

import random

from go_engine import rendered
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import make_tokenizer
from test_ollama_template import chats, jinja

from slimtune.export.chat_template import turn

PIECES = ["<|a|>", "</s>", "\n", "\n\n", " ", "### ", "User:", "[I]", "{", "{{", '"""', "\u200d", "x", "|", "\r"]
TRIMS = ["C", "C | trim", "C.lstrip()", "C.rstrip()", "C.lstrip('\\n')"]
SYSTEM = ["a message", "a message or a default", "in the first message", "in the last message", "refused", "left out"]


def made_up(seed: int) -> str:
    pick = random.Random(seed)

    def text(least: int = 0, most: int = 3) -> str:
        drawn = "".join(pick.choice(PIECES) for _ in range(pick.randint(least, most)))
        return "{{ " + repr(drawn) + " }}" if drawn else ""

    trims = {role: pick.choice(TRIMS) for role in ("system", "user", "assistant")}
    if pick.random() < 0.4:
        trims = dict.fromkeys(trims, pick.choice(TRIMS[:2]))
    place = pick.choice(SYSTEM)

    def said(role: str, content: str) -> str:
        return text() + "{{ " + trims[role].replace("C", content) + " }}" + text()

    system = said("system", "messages[0].content")
    within = {"in the first message": "loop.first", "in the last message": "loop.last"}.get(place, "false")
    user = "{% if " + within + " and told %}" + system + "{% endif %}" + said("user", "m.content")
    body = "{% if m.role == 'user' %}" + user + "{% elif m.role == 'assistant' %}" + said("assistant", "m.content")
    own = place.startswith("a message")
    body += "{% else %}" + said("system", "m.content") + "{% endif %}" if own else "{% endif %}"
    head = pick.choice(["", "{{ bos_token }}"]) + text(0, 1) + "{% set told = messages[0].role == 'system' %}"
    if place == "refused":
        head += "{% if told %}{{ raise_exception('no system messages') }}{% endif %}"
    if place == "a message or a default":
        head += "{% if not told %}" + text(1, 3) + "{% endif %}"
    loop = "messages" if own else "(messages[1:] if told else messages)"
    prompt = "{% if add_generation_prompt %}" + text() + "{% endif %}"
    return head + "{% for m in " + loop + " %}" + body + "{% endfor %}" + prompt


@given(seed=st.integers(0, 2**32), cut=st.booleans())
@settings(max_examples=25)
def test_made_up_chat_templates(seed, cut):
    tokenizer = make_tokenizer(made_up(seed), ["<s>", "<|a|>", "</s>"])
    made = turn(tokenizer, adds_bos=cut)
    assert made.template, made.notes
    asked = [m for m in chats() if made.system or m[0]["role"] != "system"]
    got = rendered([{"Template": made.template, "Messages": messages} for messages in asked])
    for messages, theirs in zip(asked, got, strict=True):
        wanted = jinja(tokenizer, messages)
        assert theirs == {"Text": wanted.removeprefix("<s>") if cut else wanted, "Error": ""}
