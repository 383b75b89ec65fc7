"""Chat templates give the text that transformers gives, and a hostile one ends with an error in bounded time."""

import time
from pathlib import Path

import pytest
from jinja2 import TemplateError

from slimtune.core.foundation.chat_rendering import render_chat_template
from slimtune.errors import ModelError, SlimtuneError
from slimtune.evaluation.lm_eval import _render_chat

TEMPLATES = sorted((Path(__file__).parents[1] / "core/data/templates").glob("*.jinja"))
TALK = [{"role": "user", "content": "Größe? " * 9}, {"role": "assistant", "content": "A lie."}] * 2
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"x": {"type": "string", "description": "y"}}, "required": ["x"]}}}]  # fmt: skip


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_text_of_transformers(tiny_tokenizer, file, tools, prompt):
    tokenizer, spans = tiny_tokenizer(chat_template=file.read_text()), []
    expected = tokenizer.apply_chat_template(TALK, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert render_chat_template(tokenizer, TALK, tools, add_generation_prompt=prompt, collected_spans=spans) == expected
    if spans:
        assert ["A lie." in expected[a:b] for a, b in spans] == [True, True]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_long_conversation_and_reasoning(tiny_tokenizer, key):
    tokenizer = tiny_tokenizer(chat_template=(TEMPLATES[0].parent / "gptoss.jinja").read_text())
    talk = [{**m, key: "so"} if m["role"] == "assistant" else m for m in TALK * 500]
    expected = tokenizer.apply_chat_template(talk, tokenize=False)
    assert render_chat_template(tokenizer, talk) == expected


def test_harness_renders_as_transformers_within_the_steps(tiny_tokenizer):
    file = next(file for file in TEMPLATES if "chatml" in file.stem or "qwen" in file.stem)
    tokenizer = tiny_tokenizer(chat_template=file.read_text())
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "continue_final_message": True}):
        expected = tokenizer.apply_chat_template(TALK, tokenize=False, **options)
        assert _render_chat(tokenizer, TALK, tokenize=False, **options) == expected
    with pytest.raises(ModelError, match="steps"):
        _render_chat(tiny_tokenizer(chat_template=LOOP), TALK)


FAILING = [
    "{{ 1/0 }}", "{{ 'a' + 1 }}", "{{ nope|tojson }}", "{% import 'os' as os %}", "{% include 'x' %}",
    "{% for i in range(1000000) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "9" * 5000 + " }}", "{{ '\\ud800' }}", "{{ namespace() }}",
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60, "{{ ''.__class__.__mro__ }}", "{{ 'x'.ljust(9999999999) }}",
    "{{ '%9999999999d' % 1 }}", "{{ '{:{}}'.format(1, '9999999999') }}", "{{ (1).to_bytes(9999999999, 'big') }}",
    "{% set x = 10 %}{{ x ** 999999999 }}", "{{ 'a'|indent(10**9) }}", "{% endfor %}",
    "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
]  # fmt: skip
GROWTH = "n.x + n.x|n.x ~ n.x|[n.x, n.x]|dict(a=n.x, b=n.x)|n.x.replace('a', n.x)|n.x~''~n.x|n.x.join([n.x, n.x, n.x])"
ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('ab', 100) }}",
    "{% for x in range(100000) if x > 99998 recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{% set n = 10**10 %}{{ [0] * n }}", "{{ messages * 10**6 }}",
    "{% for i in range(999) %}{{ range(50000)|sum }}{% endfor %}", "{{ range(99999)|list|tojson(indent=64) }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    *(f"{{% set n = namespace(x='aa') %}}{{% for i in range(99) %}}{{% set n.x = {grown} %}}{{% endfor %}}{{{{ n.x }}}}"
      for grown in GROWTH.split("|")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "kind"), [(t, TemplateError) for t in FAILING] + [(t, ModelError) for t in ENDLESS]
)
def test_hostile_template(tiny_tokenizer, template, kind):
    began = time.process_time()
    with pytest.raises(kind):
        render_chat_template(tiny_tokenizer(chat_template=template), TALK)
    assert time.process_time() - began < 5


def test_load_refuses_an_endless_template(tiny_folder):
    from slimtune.core.models.loader import load_tokenizer

    with pytest.raises(SlimtuneError, match=r"data\.chat_template"):
        load_tokenizer(str(tiny_folder), chat_template=ENDLESS[0])
