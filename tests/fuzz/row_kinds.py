"""Rows with several answers or with labels, and documents: damaged, read, reported on and tokenized as training does.

What is taken must be what the lines say: each answer of a pair with its prompt once, each label, each document with no
control token inside. What looks like an accident must be in the report.
"""

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mutations import dump_json, mutate_json, mutate_text
from transformers import PreTrainedTokenizerFast

from slimtune.core.data.rows import Row, split_preference_into_rows
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.evaluation.data_report.data_report import DataReport
from slimtune.evaluation.data_report.report_builder import make_data_report
from slimtune.extras.row_files import open_rows, read_rows

sys.path.append(str(Path(__file__).parents[1]))

from tiny_tokenizer import CHATML, make_tokenizer, template_text

Work = Callable[[], str]
Record = dict[str, Any]
Check = Callable[[list[Row], list[Record], list[dict[str, Any]], DataReport], str]
"""Returns how rows, their records, their examples and the report disagree; "" if they do not."""


@cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(template_text("qwen2_5"), CHATML)


def make_damaged_rows(
    rng: random.Random, folder: Path, changes: int, format: str | None, make: Callable[[], Record], check: Check
) -> Work:
    """Write a file of rows with so many changes; return the work that reads it and checks what comes of it."""
    records = [make() for _ in range(4)]
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
    for _ in range(changes):
        i = rng.randrange(len(lines))
        is_json_change = rng.random() < 0.7
        lines[i] = dump_json(rng, mutate_json(rng, records[i])) if is_json_change else mutate_text(rng, lines[i])
    file = folder / "rows.jsonl"
    file.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))

    def work() -> str:
        options = {"max_seq_len": 10**7}
        report = make_data_report(
            file, qwen_tokenizer(), model="tiny", format=format, processes=1, shown_row_count=4, **options
        )
        report.require_no_errors()
        rows = read_rows(file, format=format)
        examples = list(
            tokenize_dataset(open_rows(file, format=format), qwen_tokenizer(), source_path=file, **options)[0]
        )
        given = [json.loads(line) for line in file.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
        if len(rows) != len(given):
            return f"{len(given)} lines became {len(rows)} rows"
        return check(rows, given, examples, report)

    return work


# --- pairs and lists --------------------------------------------------------------------------------------------------

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a lion?"}


def make_pair(rng: random.Random, layout: str) -> Record:
    """Return a sound pair or list, whose answers repeat the prompt at random."""
    answers = rng.sample(["A big cat.", "A fish.", "A stone, I think.", "Nobody knows."], 3)
    if rng.random() < 0.3:
        prompt, texts = "Question: what is it?", [f" {a}" for a in answers]
        if layout == "implicit":
            return {"chosen": prompt + texts[0], "rejected": prompt + texts[1]}
        if layout == "list":
            return {"prompt": prompt, "responses": texts, "rankings": rng.sample([1, 2, 3], 3)}
        repeated = prompt * (rng.random() < 0.3)
        return {"prompt": prompt, "chosen": repeated + texts[0], "rejected": repeated + texts[1]}
    prompt = [SYSTEM, USER] if rng.random() < 0.5 else [USER]
    chats = [[*prompt[rng.randrange(len(prompt) + 1) :], {"role": "assistant", "content": a}] for a in answers]
    if layout == "list":
        return {"prompt": prompt, "responses": chats, "rankings": rng.sample([1, 2, 3], 3)}
    if layout == "implicit":
        return {name: [*prompt, chat[-1]] for name, chat in zip(("chosen", "rejected"), chats, strict=False)}
    return {"prompt": prompt, "chosen": chats[0], "rejected": chats[1]}


def check_pairs(rows: list[Row], records: list[Record], examples: list[dict[str, Any]], report: DataReport) -> str:
    for row, record, example in zip(rows, records, examples, strict=True):
        parts = split_preference_into_rows(row)
        if len(example["row_lengths"]) != len(parts):
            return "an answer is lost"
        if len({(json.dumps(row.messages), row.prompt) for row in parts if row.completion is not None}) > 1:
            return "texts of one pair have different prompts"
        given = json.dumps(record, ensure_ascii=False)
        for part in parts:
            if part.completion is not None:
                answers = [record.get("chosen"), record.get("rejected"), *(record.get("responses") or ())]
                whole = f"{part.prompt}{part.completion}"
                if not any(whole in (a, f"{record.get('prompt')}{a}") for a in answers):
                    return f"a text is not that of its line: {whole[:60]!r}"
                continue
            before = part.messages[: len(row.messages)]
            if before != row.messages or part.messages[len(before)]["role"] != "assistant":
                return "an answer does not follow the prompt"
            turns = [m["content"] for m in part.messages if m["role"] == "user"]
            if given.count(json.dumps(USER["content"])) and turns.count(USER["content"]) > 1:
                return "the user's turn stands twice"
            if not turns and USER["content"] in given and "no-prompt" not in {i.code for i in report.issues}:
                return "an answer has lost its question"
    return ""


# --- answers with labels, classes -------------------------------------------------------------------------------------

LABELS = [
    "ham",
    "spam",
    "Spam",
    "spam\u200b",
    "\uff53pam",
    "caf\u00e9",
    "cafe\u0301",
    "2",
    "\uff12",
    7,
    True,
    "a\u00adb",
]


def fold(label: Any) -> str:
    """Return a label as a reader sees it, without slimtune's own table of characters."""
    text = unicodedata.normalize("NFKC", str(label))
    seen = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc"))
    return unicodedata.normalize("NFKC", seen.casefold()).strip()


def make_rating(rng: random.Random) -> Record:
    answer = f"{rng.random():.3f} is the answer"
    if rng.random() < 0.5:
        return {"prompt": f"Say {rng.random():.4f}:", "completion": f" {answer}", "label": rng.random() < 0.5}
    chat = [{"role": "assistant", "content": answer}]
    return {"prompt": [USER], "completion": [USER, *chat] if rng.random() < 0.4 else chat, "label": rng.random() < 0.5}


def check_ratings(rows: list[Row], records: list[Record], examples: list[dict[str, Any]], report: DataReport) -> str:
    for row, record, example in zip(rows, records, examples, strict=True):
        words = ("true", "yes", "good", "up", "1", "1.0") if row.is_good else ("false", "no", "bad", "down", "0", "0.0")
        if fold(record["label"]) not in words:
            return f"the label {record['label']!r} was read as {row.is_good}"
        before = next((i for i, label in enumerate(example["labels"]) if label >= 0), 0)
        if not before:
            return "an answer has no prompt"
        if [m["content"] for m in row.messages].count(USER["content"]) > json.dumps(record["prompt"]).count("a lion"):
            return "the user's turn stands twice"
    return ""


def make_labelled(rng: random.Random) -> Record:
    label: Any = rng.choice(LABELS) if rng.random() < 0.8 else rng.sample(["ham", "spam", "x"], rng.randrange(1, 3))
    return {"text": f"A text of {rng.random():.4f}.", "label": label}


def check_labels(rows: list[Row], records: list[Record], examples: list[dict[str, Any]], report: DataReport) -> str:
    names = {name for row in rows for name in row.labels or ()}
    for row, record in zip(rows, records, strict=True):
        given = record["label"] if isinstance(record["label"], list) else [record["label"]]
        if not isinstance(record["label"], str) and [str(g).strip() for g in given] != [*(row.labels or ())]:
            as_integers = [str(int(g)) if isinstance(g, float) else str(g).strip() for g in given]
            if as_integers != [*(row.labels or ())]:
                return f"the label {record['label']!r} was read as {row.labels}"
    if len({fold(name) for name in names}) < len(names) and "similar-labels" not in {i.code for i in report.issues}:
        return f"classes that look alike are not told: {sorted(map(ascii, names))}"
    return ""


# --- documents --------------------------------------------------------------------------------------------------------


def make_document_record(rng: random.Random) -> Record:
    words = [
        rng.choice(["a lion", "<|im_start|>", "<|im_end|>user", "caf\u00e9", "\n\n", "<|endoftext|>"]) for _ in range(6)
    ]
    return {"text": f"It is {rng.random():.4f} {' '.join(words)} so."}


def check_documents(rows: list[Row], records: list[Record], examples: list[dict[str, Any]], report: DataReport) -> str:
    tokenizer = qwen_tokenizer()
    special, told = set(tokenizer.all_special_ids), {i.code for i in report.issues}
    for record, example in zip(records, examples, strict=True):
        ids = example["input_ids"]
        if special & set(ids[:-1]) or ids[-1] != tokenizer.eos_token_id:
            return "a control token was read in a document, or its end is missing"
        if tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) != record["text"]:
            return "a document is not its text"
        if any(token in record["text"] for token in CHATML) and "special-token-as-text" not in told:
            return "a special token in a document is not told"
    return ""


def make_pairs_file(rng: random.Random, folder: Path, changes: int) -> Work:
    layout = rng.choice(["implicit", "list", "given"])
    return make_damaged_rows(rng, folder, changes, None, lambda: make_pair(rng, layout), check_pairs)


def make_ratings_file(rng: random.Random, folder: Path, changes: int) -> Work:
    return make_damaged_rows(rng, folder, changes, "unpaired-preference", lambda: make_rating(rng), check_ratings)


def make_labels_file(rng: random.Random, folder: Path, changes: int) -> Work:
    return make_damaged_rows(rng, folder, changes, "classification", lambda: make_labelled(rng), check_labels)


def make_documents_file(rng: random.Random, folder: Path, changes: int) -> Work:
    return make_damaged_rows(rng, folder, changes, "document", lambda: make_document_record(rng), check_documents)


ROW_KINDS = {
    "pairs": make_pairs_file,
    "kto": make_ratings_file,
    "classification": make_labels_file,
    "documents": make_documents_file,
}
