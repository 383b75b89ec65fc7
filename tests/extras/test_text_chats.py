"""Prompts and answers that are texts are read as a chat, unless a setting says otherwise."""

import copy

import pytest
from row_files import write_jsonl
from tiny_tokenizer import SMOLLM2_TOK

from slimtune.core.data.tokenize import tokenize_dataset, tokenize_rows_with_errors
from slimtune.errors import SlimtuneError
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.extras.row_digest import hash_rows
from slimtune.extras.row_files import open_rows, read_rows

PAIR = {"prompt": "Name it.", "chosen": " so 1", "rejected": "so 2"}
RATED = {"prompt": "Name it.", "completion": " so 1", "label": "up"}
LIST = {"prompt": "Name it.", "responses": ["so 2", " so 1"], "scores": [1, 2]}
INSTRUCTION = {"instruction": "Name it.", "output": "so 1"}


def read_tokens(tmp_path, record, **options):
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", [record]), **options)
    (tokens,) = tokenize_rows_with_errors(rows, SMOLLM2_TOK)
    best = tokens.split()[0]
    return best.input_ids, best.supervised


@pytest.mark.parametrize(("record", "options"), [(PAIR, {}), (LIST, {}), (RATED, {"format": "unpaired-preference"})])
def test_the_best_text_has_the_tokens_of_the_instruction_row(tmp_path, record, options):
    assert read_tokens(tmp_path, record, **options) == read_tokens(tmp_path, INSTRUCTION)


def test_messages_give_the_same_tokens(tmp_path):
    turns = {"chosen": "so 1", "rejected": "so 2"}
    chat = {"prompt": [{"role": "user", "content": "Name it."}]} | {
        name: [{"role": "assistant", "content": text}] for name, text in turns.items()
    }
    assert read_tokens(tmp_path, PAIR) == read_tokens(tmp_path, chat)


@pytest.mark.parametrize(("record", "options"), [(PAIR, {}), (LIST, {}), (RATED, {"format": "unpaired-preference"})])
def test_the_setting_reads_plain_texts(tmp_path, record, options):
    ids, supervised = read_tokens(tmp_path, record, apply_chat_template=False, **options)
    assert SMOLLM2_TOK.decode([i for i, s in zip(ids, supervised, strict=True) if not s]) == "Name it."


def test_two_texts_without_a_prompt_stay_texts(tmp_path):
    (row,) = read_rows(write_jsonl(tmp_path / "a.jsonl", [{"chosen": "It is four", "rejected": "It is five"}]))
    assert (row.messages, row.prompt) == ([], "It is")


def test_a_prompt_that_both_answers_repeat_is_the_users_turn_alone(tmp_path):
    record = {"prompt": "Name it.", "chosen": "Name it. so 1", "rejected": "Name it. so 2"}
    assert read_tokens(tmp_path, record) == read_tokens(tmp_path, PAIR)


@pytest.mark.parametrize("apply", [True, False])
def test_the_report_says_once_how_texts_are_read(tmp_path, apply):
    path = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "prompt": f"Name {i}."} for i in range(3)])
    report = make_data_report(path, SMOLLM2_TOK, model="tiny", processes=1, apply_chat_template=apply)
    assert [("--no-apply-chat-template" in note) for note in report.notes] == [True] * apply


def test_the_setting_changes_the_digest_of_the_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    digests = set()
    for apply in (True, False):
        rows = open_rows(path, apply_chat_template=apply)
        digests.add(hash_rows(tokenize_dataset(rows, SMOLLM2_TOK, max_seq_len=99, source_path="a")[0]))
    assert len(digests) == 2


def test_a_base_without_any_template_is_answered_with_the_setting(tmp_path):
    tokenizer = copy.deepcopy(SMOLLM2_TOK)
    tokenizer.chat_template = None
    with pytest.raises(SlimtuneError) as caught:
        tokenize_rows_with_errors(read_rows(write_jsonl(tmp_path / "a.jsonl", [PAIR])), tokenizer)
    assert "--no-apply-chat-template" in caught.value.hint


def test_tools_that_the_template_leaves_out_are_answered_with_bases_that_have_them(tmp_path):
    record = {
        "tools": [{"name": "weather", "parameters": {"type": "object", "properties": {}}}],
        "messages": [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": "Where?"}],
    }
    rows = read_rows(write_jsonl(tmp_path / "a.jsonl", [record]))
    (invalid,) = tokenize_rows_with_errors(rows, SMOLLM2_TOK)
    assert invalid.code == "template-leaves-out"
    assert "qwen2.5-0.5b, qwen3-0.6b, llama-3.2-1b" in invalid.hint
