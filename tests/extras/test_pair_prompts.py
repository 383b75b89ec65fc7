"""Prompts that answers of pairs and lists repeat, in whole or in part, and pairs whose prompt cannot be known."""

import pytest
from row_files import find_issues, write_jsonl
from tiny_tokenizer import SMOLLM2_TOK as TOK

from slimtune.core.data.rows import InvalidRow
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.core.data.tokenized_dataset import list_tokens_and_labels_by_row
from slimtune.extras.row_files import open_rows


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, USER = turn("system", "Be brief."), turn("user", "What is a lion?")
YES, NO, OTHER = (turn("assistant", text) for text in ("A big cat.", "A fish.", "A dog."))
MORE, LAST = turn("user", "And a mouse?"), turn("assistant", "A rodent.")


def render(*messages):
    return TOK.apply_chat_template([*messages], tokenize=False)


@pytest.fixture
def texts(tmp_path):
    """Return a function: the text of each answer of a row, and what of it is learned."""

    def read(row, **options):
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        (example,) = tokenize_dataset(open_rows(path, **options), TOK, max_seq_len=999, source_path=path)[0]
        return [
            (TOK.decode(ids), TOK.decode([t for t in labels if t >= 0]))
            for ids, labels in list_tokens_and_labels_by_row(example)
        ]

    return read


@pytest.fixture
def refusal(tmp_path):
    def read(row):
        (found,) = open_rows(write_jsonl(tmp_path / "a.jsonl", [row]))
        assert isinstance(found, InvalidRow)
        return found

    return read


@pytest.fixture
def issues(tmp_path):
    return lambda *rows: find_issues(write_jsonl(tmp_path / "a.jsonl", rows), TOK)


# --- messages ---------------------------------------------------------------------------------------------------------

TALK = [SYSTEM, USER]
REPEATS = {
    "in neither": (TALK, [YES], [NO]),
    "in the chosen": (TALK, [*TALK, YES], [NO]),
    "in the rejected": (TALK, [YES], [*TALK, NO]),
    "in both": (TALK, [*TALK, YES], [*TALK, NO]),
    "the user's turn in both": (TALK, [USER, YES], [USER, NO]),
    "the user's turn in one": (TALK, [USER, YES], [NO]),
    "whole in one, in part in the other": (TALK, [*TALK, YES], [USER, NO]),
    "the question in the answers alone": ([SYSTEM], [USER, YES], [USER, NO]),
    "nothing apart": (None, [*TALK, YES], [*TALK, NO]),
    "a text": ("What is a  lion?", [*TALK, YES], [*TALK, NO]),
    "an answer that is a text": (TALK, [*TALK, YES], NO["content"]),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), REPEATS.values(), ids=REPEATS)
def test_prompt_stands_once_before_each_answer(texts, prompt, chosen, rejected):
    row = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    found = texts(row)
    assert [text for text, _ in found] == [render(*TALK, YES), render(*TALK, NO)]
    assert [learned for _, learned in found] == [f"{m['content']}<|im_end|>" for m in (YES, NO)]


def test_each_answer_of_a_list_is_read_by_itself(texts):
    answers = [[*TALK, YES], [USER, OTHER], [NO]]
    found = texts({"prompt": TALK, "responses": answers, "scores": [3, 2, 1]})
    assert [text for text, _ in found] == [render(*TALK, answer) for answer in (YES, OTHER, NO)]
    assert [learned for _, learned in found] == [f"{m['content']}<|im_end|>" for m in (YES, OTHER, NO)]


def test_later_turns_are_learned_and_shared_ones_are_prompt(texts):
    found = texts({"chosen": [USER, YES, MORE, LAST], "rejected": [USER, YES, MORE, NO]})
    assert [learned for _, learned in found] == ["A rodent.<|im_end|>", "A fish.<|im_end|>"]


@pytest.mark.parametrize("file_format", ["prompt-completion", "unpaired-preference"])
def test_completion_that_repeats_its_prompt(texts, file_format):
    (found,) = texts({"prompt": TALK, "completion": [USER, YES], "label": True}, format=file_format, ignore_columns=[
        "label"] if file_format == "prompt-completion" else [])  # fmt: skip
    assert found == (render(*TALK, YES), "A big cat.<|im_end|>")


UNCLEAR = {
    "different questions": (None, [USER, YES], [MORE, NO]),
    "a system text in one": (None, [SYSTEM, USER, YES], [USER, NO]),
    "different system texts": (None, [SYSTEM, USER, YES], [turn("system", "Be long."), USER, NO]),
    "a question after the prompt's": ([USER], [MORE, YES], [MORE, NO]),
    "another question in one": ([USER], [MORE, YES], [NO]),
    "a system text after the prompt": ([USER], [SYSTEM, YES], [SYSTEM, NO]),
    "questions after a system text": ([SYSTEM], [USER, YES], [MORE, NO]),
    "another text": ("Who?", [USER, YES], [USER, NO]),
    "a text before answers alone": ("What is a lion?", [YES], [NO]),
}


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), UNCLEAR.values(), ids=UNCLEAR)
def test_pair_with_several_prompts_is_refused(refusal, prompt, chosen, rejected):
    row = {"chosen": chosen, "rejected": rejected} | ({} if prompt is None else {"prompt": prompt})
    found = refusal(row)
    assert (found.line, found.code) == (1, "different-prompts")
    assert found.hint


@pytest.mark.parametrize("completion", [[MORE, LAST], [SYSTEM, YES]])
@pytest.mark.parametrize("file_format", ["prompt-completion", "unpaired-preference"])
def test_completion_of_another_question_is_refused(tmp_path, file_format, completion):
    row = {"prompt": [USER], "completion": completion} | ({"label": True} if "unpaired" in file_format else {})
    (found,) = open_rows(write_jsonl(tmp_path / "a.jsonl", [row]), format=file_format)
    assert (type(found), found.code) == (InvalidRow, "different-prompts")


def test_different_prompts_in_a_list_are_refused(refusal):
    found = refusal({"prompt": [SYSTEM], "responses": [[USER, YES], [USER, NO], [MORE, OTHER]], "scores": [3, 2, 1]})
    assert found.code == "different-prompts"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": [], "chosen": [YES], "rejected": [NO]}, "empty-content"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty-content"),
        ({"chosen": [USER, YES], "rejected": [USER, YES, MORE, LAST]}, "empty-answer"),
        ({"prompt": [USER, YES], "chosen": [USER, YES], "rejected": [NO]}, "empty-answer"),
        ({"prompt": "Q: a", "chosen": "Q: a", "rejected": "Q: a b"}, "empty-answer"),
    ],
)
def test_pair_without_a_prompt_or_an_answer_is_refused(refusal, row, code):
    assert refusal(row).code == code


def test_question_that_differs_after_the_first_answer_is_a_finding(issues):
    pair = {"chosen": [USER, YES, MORE, LAST], "rejected": [USER, NO, turn("user", "Really?"), LAST]}
    sound = [{"prompt": [turn("user", f"{i}?")], "chosen": [YES], "rejected": [NO]} for i in range(9)]
    found = issues(*sound, pair)
    assert (found["different-turns"]["severity"], found["different-turns"]["lines"]) == ("warning", [10])


def test_pair_without_any_prompt_is_a_finding(issues):
    assert issues({"chosen": [YES], "rejected": [NO]})["no-prompt"]["lines"] == [1]
    assert issues({"chosen": "yes", "rejected": "no"})["no-prompt"]["lines"] == [1]


# --- texts, read as they are: as chats test_text_chats.py has them ----------------------------------------------------

PLAIN = {"apply_chat_template": False}


def test_text_prompt_that_all_answers_repeat_stands_once_and_is_told(texts, issues):
    pair = {"prompt": "Q: who?", "chosen": "Q: who? A cat.", "rejected": "Q: who? A fish."}
    assert texts(pair, **PLAIN) == [(f"Q: who?{a}<|im_end|>", f"{a}<|im_end|>") for a in (" A cat.", " A fish.")]
    assert issues(pair)["repeated-prompt"]["lines"] == [1]
    ranked = {"prompt": "Q:", "responses": ["Q: a", "Q: b", "Q: c"], "scores": [1, 3, 2]}
    assert [text for text, _ in texts(ranked, **PLAIN)] == ["Q: b<|im_end|>", "Q: c<|im_end|>", "Q: a<|im_end|>"]


def test_text_prompt_in_one_answer_is_kept_and_is_an_error_if_it_is_frequent(texts, issues):
    pair = {"prompt": "Q: who?", "chosen": " A cat.", "rejected": "Q: who? A fish."}
    assert [text for text, _ in texts(pair, **PLAIN)] == [
        "Q: who? A cat.<|im_end|>",
        "Q: who?Q: who? A fish.<|im_end|>",
    ]
    assert issues(pair)["prompt-in-answer"]["severity"] == "error"
    sound = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(20)]
    assert issues(*sound, pair)["prompt-in-answer"]["severity"] == "warning"


@pytest.mark.parametrize("rejected", ["A fish.", "What is a lion? A fish."])
def test_text_answer_that_quotes_the_question_of_a_chat_is_told(texts, issues, rejected):
    pair = {"prompt": TALK, "chosen": "What is a lion? A big cat.", "rejected": rejected}
    assert [learned for _, learned in texts(pair)] == [f"{pair[c]}<|im_end|>" for c in ("chosen", "rejected")]
    assert issues(pair)["prompt-in-answer"]["severity"] == "error"


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_turn_of_weight_zero_in_an_answer_is_refused(refusal, column):
    answers = {"chosen": [YES | {"weight": 0}, MORE, LAST], "rejected": [NO | {"weight": 0}, MORE, LAST]}
    other = {c: [NO] for c in ("chosen", "rejected") if c != column}
    found = refusal({"prompt": TALK, column: answers[column], **other})
    assert (found.line, found.code) == (1, "bad-weight")


def test_weights_of_the_prompts_turns_and_of_learned_ones_change_nothing(texts):
    before = [USER | {"weight": 0}, YES | {"weight": 0}, MORE]
    for row in (
        {"chosen": [*before, LAST | {"weight": 1}], "rejected": [*before, NO]},
        {"prompt": before, "chosen": [LAST | {"weight": 1}], "rejected": [NO]},
    ):
        assert [learned for _, learned in texts(row)] == ["A rodent.<|im_end|>", "A fish.<|im_end|>"]


def test_word_that_begins_like_the_prompt_repeats_nothing(texts):
    pair = {"prompt": "A", "chosen": "Apple", "rejected": "Ant"}
    assert [text for text, _ in texts(pair, **PLAIN)] == ["AApple<|im_end|>", "AAnt<|im_end|>"]


def test_completion_that_begins_with_its_prompt_is_told(issues):
    assert issues({"prompt": "Once", "completion": "Once upon"})["prompt-in-completion"]["severity"] == "warning"


@pytest.mark.parametrize(
    ("chosen", "rejected", "learned"),
    [
        ("It is four.", "It is five.", [" four.", " five."]),
        ("Q: it", "Q: it is", [" it", " it is"]),
        ("Q? yes", "Q?\nno", [" yes", "\nno"]),
        ("Say (A)", "Say (B)", [" (A)", " (B)"]),
        ("Q:\nyes", "Q:\nno", ["yes", "no"]),
    ],
)
def test_implicit_prompt_divides_no_word(texts, chosen, rejected, learned):
    assert texts({"chosen": chosen, "rejected": rejected}) == [
        (f"{text}<|im_end|>", f"{own}<|im_end|>") for text, own in zip((chosen, rejected), learned, strict=True)
    ]
