"""What every way of `benchmarks/step.py` is given: rows, encoded once, and the base as a folder of Hugging Face's.

    python rows.py SPEC.json

The rows are The Devil's Dictionary's training rows, in an order drawn from the seed:

    plain     no beginning to share: rendered without a system turn, so that they begin with `<|im_start|>user`, a line
              end, `Define "` and the word. Of two rows that still agree in their first 8 tokens one is left out.
    system    `SYSTEM` before each: a style guide, as long as system prompts of narrow tasks are
    default   as `make demo` has them: the system turn that SmolLM2's template writes where a conversation has none
"""

import json
import random
import sys
from pathlib import Path

import transformers

from slimtune.core.data.packing import MIN_SHARED_TOKENS
from slimtune.core.data.rows import Row
from slimtune.core.data.tokenize import tokenize_dataset
from slimtune.core.models.loader import load_base
from slimtune.extras.row_files import read_rows

FILE = Path(__file__).parents[2] / "examples/devils-dictionary/train.jsonl"
NO_SYSTEM_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = (
    "You are the author of a satirical dictionary. Define the word you are given in one to three sentences, in the "
    "voice of a weary and well-read cynic of the nineteenth century: dry, exact and unkind to every profession alike. "
    "Prefer irony to insult, never explain the joke, and do not mention that you are a machine."
)


def encoded(tokenizer, conversations: list[Row], kind: str) -> list[dict]:
    """The rows of a kind as `{input_ids, labels}`."""
    if kind == "system":
        first = {"role": "system", "content": SYSTEM}
        conversations = [Row([first, *row.messages], row.line) for row in conversations]
    own = tokenizer.chat_template
    tokenizer.chat_template = NO_SYSTEM_TURN if kind == "plain" else own
    found, _ = tokenize_dataset(conversations, tokenizer, max_seq_len=1024, on_overlong="error", source_path=FILE)
    tokenizer.chat_template = own
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in found]
    return unlike(rows) if kind == "plain" else rows


def unlike(rows: list[dict]) -> list[dict]:
    """The rows without those that begin as an earlier one does."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for row in rows:
        first = tuple(row["input_ids"][:MIN_SHARED_TOKENS])
        if first not in seen:
            kept.append(row)
        seen.add(first)
    return kept


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    transformers.utils.logging.disable_progress_bar()
    base = load_base(spec["model"], dtype=spec["dtype"], device="cpu")
    base.model.save_pretrained(spec["base"])
    base.tokenizer.save_pretrained(spec["base"])
    conversations = read_rows(FILE)
    random.Random(spec["seed"]).shuffle(conversations)
    kinds = {kind: encoded(base.tokenizer, conversations, kind) for kind in spec["kinds"]}
    Path(spec["rows"]).write_text(json.dumps({"pad_token_id": base.tokenizer.pad_token_id, "kinds": kinds}))


if __name__ == "__main__":
    main()
