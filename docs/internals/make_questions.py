"""Write docs/questions.md: questions, their commands, and what these answer: `make_questions.py [WORDS …]`.

Each command is run, without a network. `keep` picks the lines of its output that are shown; without one all are. After
WORDS, such as `plan cost`, only the rows whose command or question has one of them are asked again (all of them take 20
minutes of processor time); the others stay as the page has them.
"""

import argparse
import re
import runpy
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "questions.md"
RUN_COMMAND = runpy.run_path(str(Path(__file__).parent / "make_blocks.py"))["run_command"]
HEAD = """# Questions and their commands

What people ask before, during and after tuning a model; the command or the page that answers; and what the command
said, shortened, when this page was made (`python docs/internals/make_questions.py`). None of them needs a network.

| question | command or page | answer |
| --- | --- | --- |
"""
JOB = "llama-3.1-8b --quantization nf4 --gradient-checkpointing"


class Row(NamedTuple):
    """A question with its command, or with a page (then the answer is what the page has)."""

    question: str
    command: str = ""
    keep: str = "."
    page: str = ""


ROWS = (
    Row("Will this training run on my card?", f"plan {JOB} --gpu rtx-3060-12gb", "fits on|it needs"),
    Row("Will it run there, and how fast?", f"plan {JOB} --gpu rtx-3060-12gb --serve", "tokens (written|of)"),
    Row("Which graphics card is best for it?", f"choose {JOB} --kind desktop --budget 1500", "^to buy|fastest"),
    Row("Which laptop?", f"choose {JOB} --kind laptop", "^to buy|fastest"),
    Row("Which Mac?", f"choose {JOB} --kind mac --hours 24", "^to buy|fastest"),
    Row("Which machine, if I have 1500 $ and one night?", f"choose {JOB} --budget 1500 --hours 10", "^to |fastest"),
    Row("How do two machines compare?", "gpus rtx-3090 'm4 max 128gb'", "rtx|memory|bandwidth|price  |writes|reads"),
    Row("Buy, rent, or pay a service?", f"cost {JOB} --gpu rtx-3090 --tokens 5000000 --runs 20", "^buy|^rent|AI,"),
    Row("What can my machine run and train?", "models --fits rtx-3060-12gb", "^base|^qwen3.5|run or train"),
    Row("Which base do I tune on it?", "models --fits rtx-3060-12gb --purpose json", "^fields|^1\\.|suit it"),
    Row("What does a million tokens of answers cost?", "cost llama-3.1-8b --gpu rtx-3090 --serve", "million|elec|Groq"),
    Row("Which MacBook?", f"choose {JOB} --kind macbook", "^to buy|fastest"),
    Row("Which machine only to run a model?", "choose llama-3.1-8b --serve --budget 800", "^to buy|fastest"),
    Row("Which machine is cheapest to rent?", f"choose {JOB} --kind rent", "^to rent|fastest"),
    Row("What can this machine do?", "doctor", "ready|auto|memory|disk"),
    Row("How fast is this machine?", page="`slimtune bench`: [what it measures](cli.md#bench)"),
    Row("How fast does my run answer here?", page="`slimtune bench RUN`: [base, adapter, merged](cli.md#bench)"),
    Row("What have others measured?", "benchmarks --gpu rtx-4090 --model llama-3.1-8b", "GPU|decode"),
    Row("Which bases are there, and may I use them?", "models --family qwen3", "name|qwen3-0.6b |qwen3-8b "),
    Row("Which cards does it know?", "gpus --kind mini", "GPU|spark|strix-halo-128"),
    Row("Where is a figure from, and how old is it?", "gpus rtx-4090 rtx-3090 --sources", "4090 .*checked|0.34|spot"),
    Row("Which methods are there?", "methods", "^ *(method|lora|ia3|prefix)"),
    Row("What does it mean: CUDA out of memory?", "explain 'CUDA out of memory'", "^cuda|--grad|--quant"),
    Row("Why is Ollama slow?", "explain 'ollama slow'", "^ollama|100%|--merged"),
    Row("Why is ROCm not detected?", "explain 'ROCm not detected'", "^rocm|usermod|pip install"),
    Row("How do I start?", page="[Install](install.md), then [your first adapter](first_adapter.md)"),
    Row("Is the tuned model better?", page="[Is it better?](eval.md): `slimtune eval RUN`"),
    Row("Which programs run the result?", page="[Ollama](ollama.md), [vLLM](vllm.md), llama.cpp and transformers: "
        "[which way to ship](export.md)"),
    Row("How are predictions made, how good are they?", page="[How accurate it is](plan.md#how-accurate-it-is)"),
    Row("What are LoRA, adapters, QLoRA?", page="[PEFT explained from zero](learn/README.md)"),
    Row("What does this word mean?", page="`slimtune explain 'what is an epoch'`, or the [glossary](glossary.md)"),
    Row("How many rows do I need?", page="100 to 500 for a tone, more for a format or a domain: "
        "[Quick answers](quick_answers.md#how-many-rows-do-i-need)"),
    Row("My Ollama model answers nonsense. Why?", "explain template-mismatch", "^template|export "),
    Row("Which rank, how many rows, how long?", page="[Quick answers](quick_answers.md)"),
    Row("Has anybody example rows and prompts?", page="[Starters](starters.md)"),
    Row("What has changed?", page="`CHANGELOG.md` in the source"),
)  # fmt: skip


def ask(row: Row) -> str:
    """Return the lines of the answer that are shown, as a table's cell."""
    printed = RUN_COMMAND(shlex.split(row.command), Path(tempfile.gettempdir()))
    if printed[0].startswith("error: "):
        raise SystemExit("\n".join([f"slimtune {row.command}", *printed]))
    lines = [re.sub(r"  +", " · ", line.strip()) for line in printed if re.search(row.keep, line)]
    return "<br>".join(re.sub(r"([|<>])", r"\\\1", line) for line in lines)


def start_line(row: Row) -> str:
    """Return the question's line of the table up to the answer."""
    return f"| {row.question} | {row.page or f'`slimtune {row.command}`'} |"


def make_page(words: Sequence[str] = ()) -> str:
    """Return the page; with `words`, the lines of rows that have none of them are those that the page has now."""
    old = PAGE.read_text(encoding="utf-8").splitlines(keepends=True) if words else []

    def make_line(row: Row) -> str:
        kept = next((line for line in old if line.startswith(start_line(row))), "")
        if kept and not any(word.lower() in f"{row.command} {row.question}".lower() for word in words):
            return kept
        return f"{start_line(row)} {ask(row) if row.command else ''} |\n"

    return HEAD + "".join(make_line(row) for row in ROWS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORDS")
    PAGE.write_text(make_page(parser.parse_args().words), encoding="utf-8")
