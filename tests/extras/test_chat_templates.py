"""Built-in chat templates: which one a base without a template gets, and what they write."""

import pytest
from tiny_tokenizer import CHATML, GEMMA, LLAMA3, make_tokenizer

from slimtune.core.data.chat_template import encode_chat_with_train_mask
from slimtune.core.foundation.chat_rendering import CHAT_TEMPLATES
from slimtune.errors import UsageError
from slimtune.extras.chat_templates import is_built_in_template, set_chat_template

CHAT = [{"role": "user", "content": "Define hope."}, {"role": "assistant", "content": "A polite lie."}]
VOCABULARIES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "plain": ["<s>", "</s>"]}


def get_learned_text(tokenizer, messages):
    row = encode_chat_with_train_mask(tokenizer, messages)
    return tokenizer.decode([t for t, learned in zip(row.input_ids, row.supervised, strict=True) if learned])


def test_plain_is_last_because_it_fits_every_vocabulary():
    assert CHAT_TEMPLATES.built_in_names()[-1] == "plain"


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_base_without_a_template_gets_the_one_that_its_tokens_are_made_for(name):
    tokenizer = make_tokenizer(None, VOCABULARIES[name])
    set_chat_template(tokenizer, None, "a base")
    assert is_built_in_template(tokenizer.chat_template)
    assert tokenizer.chat_template.endswith(CHAT_TEMPLATES.load(name).text)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_an_answer_and_its_end_are_learned(name):
    tokenizer = make_tokenizer(None, VOCABULARIES[name])
    set_chat_template(tokenizer, name, "a base")
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "plain": "</s>"}
    assert get_learned_text(tokenizer, CHAT) == CHAT[1]["content"] + ends[name]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_prompt_of_generation_is_what_stands_before_the_answer(name):
    tokenizer = make_tokenizer(None, VOCABULARIES[name])
    set_chat_template(tokenizer, name, "a base")
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True))


def test_gemma_writes_a_system_message_into_the_first_turn_of_the_user():
    tokenizer = make_tokenizer(None, GEMMA)
    set_chat_template(tokenizer, "gemma", "a base")
    text = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *CHAT], tokenize=False)
    user = "<start_of_turn>user\nBe brief.\n\nDefine hope.<end_of_turn>\n"
    assert text == f"{user}<start_of_turn>model\n{CHAT[1]['content']}<end_of_turn>\n"


def test_a_base_keeps_its_own_template():
    tokenizer = make_tokenizer("{{ messages }}", GEMMA)
    set_chat_template(tokenizer, None, "a base")
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_template_whose_end_is_no_token_is_refused():
    with pytest.raises(UsageError) as caught:
        set_chat_template(make_tokenizer(None, GEMMA), "chatml", "a base")
    assert caught.value.hint == "--chat-template gemma"


def test_a_misspelt_name_is_corrected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        set_chat_template(make_tokenizer(None, CHATML), "chatlm", "a base")
    assert "'chatml'?" in caught.value.message
