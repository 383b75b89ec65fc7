"""What assistants think before they answer: what each family of chat templates keeps, and what is learned of it."""

from pathlib import Path

import pytest
import trl
from row_files import find_issues, write_jsonl
from tiny_tokenizer import CHATML, DEEPSEEK, GPT_OSS, SMOLLM2_TOK, make_tokenizer, template_text

from slimtune.core.data.chat_template import TokenizedRow
from slimtune.core.data.tokenize import tokenize_rows_with_errors
from slimtune.evaluation.data_report.data_report import ThinkingTurnCounts
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.extras.row_columns import parse_row_or_error

# SmolLM3's rules in short: it reads no key, keeps every content, and by "/no_think" writes an empty block.
SMOLLM3 = (
    "{% set thinks = '/no_think' not in messages[0].content %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not thinks %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
TRL = Path(trl.__file__).with_name("chat_templates")
TOKENIZERS = {
    "qwen3": make_tokenizer(template_text("qwen3"), CHATML),
    "smollm3": make_tokenizer(SMOLLM3, CHATML),
    "deepseek-r1": make_tokenizer((TRL / "deepseek_r1_distill.jinja").read_text(), DEEPSEEK),
    "deepseek-r1 training": make_tokenizer((TRL / "deepseek_r1_distill_training.jinja").read_text(), DEEPSEEK),
    "gpt-oss": make_tokenizer(template_text("gptoss"), GPT_OSS),
}
ASK = {"role": "user", "content": "Is it?"}
BY_TAG = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
BY_KEY = {"role": "assistant", "content": "Yes.", "thinking": "Hm."}
PLAIN = {"role": "assistant", "content": "No."}
QWEN, R1_ANSWER = "<think>\nHm.\n</think>\n\nYes.<|im_end|>", "\nHm.\n</think>\n\nYes.<｜end▁of▁sentence｜>"
HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"


def tokenize(family, *messages, **options):
    (found,) = tokenize_rows_with_errors(
        [parse_row_or_error({"messages": list(messages)}, "chat", 7)], TOKENIZERS[family], **options
    )
    return found


def learned_text(family, row):
    assert isinstance(row, TokenizedRow), row
    return TOKENIZERS[family].decode([t for t, s in zip(row.input_ids, row.supervised, strict=True) if s])


@pytest.mark.parametrize(
    ("family", "answer", "learned"),
    [
        ("qwen3", BY_TAG, QWEN),
        ("qwen3", {**BY_KEY, "reasoning_content": "Hm.", "thinking": None}, QWEN),
        ("smollm3", BY_TAG, QWEN),
        ("deepseek-r1 training", BY_TAG, R1_ANSWER),
        ("gpt-oss", BY_KEY, HARMONY),
    ],
)
def test_last_turn_is_learned_with_what_it_thinks(family, answer, learned):
    """And its prompt has the tokens of generation's prompt."""
    row = tokenize(family, ASK, answer)
    assert learned_text(family, row).endswith(learned.removeprefix("<think>"))
    assert (row.thinking_turn_counts, row.generation_prompt_differs) == ((1, 0, 0), False)
    tok = TOKENIZERS[family]
    prompt = tok.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False)
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    assert row.input_ids[: len(ids)] == ids
    assert row.supervised[len(ids)]


@pytest.mark.parametrize(
    ("family", "messages", "refused"),
    [
        ("qwen3", [ASK, BY_TAG, ASK, PLAIN], "'<think>…</think>' of messages[1]"),
        ("gpt-oss", [ASK, BY_KEY, ASK, PLAIN], "'thinking' of messages[1]"),
        ("deepseek-r1", [ASK, BY_TAG], "'<think>…</think>' of messages[1]"),
        ("smollm3", [ASK, BY_TAG, ASK, PLAIN], ""),
        ("smollm3", [ASK, BY_KEY], "'thinking', which the chat template does not read"),
    ],
)
def test_thinking_that_the_template_leaves_out_is_refused(family, messages, refused):
    row = tokenize(family, *messages)
    assert refused in getattr(row, "cause", "")
    assert isinstance(row, TokenizedRow) != bool(refused)


@pytest.mark.parametrize(("family", "answer"), [("qwen3", BY_TAG), ("gpt-oss", BY_KEY)])
def test_thinking_of_turns_that_are_not_learned_may_be_left_out(family, answer):
    row = tokenize(family, ASK, answer, ASK, answer, train_on="last_assistant")
    assert row.thinking_turn_counts == (1, 0, 1)
    assert learned_text(family, row).count("Hm.") == 1


def test_prompt_that_ends_with_a_tag_and_answers_that_do_not_think():
    assert tokenize("deepseek-r1", ASK, PLAIN).generation_prompt_differs
    assert not tokenize("qwen3", ASK, PLAIN).generation_prompt_differs


def test_report_names_answers_that_generation_would_begin_with_another_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [ASK, PLAIN]}])
    assert "other-prompt" in find_issues(path, TOKENIZERS["deepseek-r1"])


def test_report_tells_what_the_template_does(tmp_path):
    rows = [[ASK, BY_TAG, ASK, {**BY_TAG, "content": f"<think>Oh.</think>It is {i}."}] for i in range(3)]
    path, tokenizer = write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in rows]), TOKENIZERS["qwen3"]
    (issue,) = find_issues(path, tokenizer).values()
    assert (issue["code"], issue["severity"], issue["lines"]) == ("thinking-left-out", "error", [1, 2, 3])
    assert "--train-on last_assistant" in issue["hint"]
    report = make_data_report(path, tokenizer, model="tiny", train_on="last_assistant", processes=1)
    assert report.thinking == ThinkingTurnCounts(learned=3, kept=0, left_out=3)
    told = "3 turns learned with what they think; 3 turns not learned, whose thinking the template leaves out"
    assert dict(report.lines())["thinking"].startswith(told)


@pytest.mark.parametrize(
    ("answer", "is_told"),
    [("<think>so A", True), ("so</think>A", True), ("<think>so</think>A", False), ("A", False)],
)
def test_unbalanced_thinking_is_told_if_the_template_has_none(tmp_path, answer, is_told):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert ("unbalanced-thinking" in find_issues(path, SMOLLM2_TOK)) == is_told
    thinks = make_tokenizer(template_text("qwen3"), CHATML)
    assert "unbalanced-thinking" not in find_issues(path, thinks)
