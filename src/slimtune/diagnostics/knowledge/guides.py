"""Answers to questions that are no errors: a command, or a section of Quick answers, of the glossary or of a lesson."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COMMANDS = {
    "slimtune choose MODEL": (
        "ranks the machines that train it, to buy and to rent",
        "which gpu should I buy | which gpu for fine-tuning | which laptop | which macbook or mac to buy | which "
        "graphics card | which machine should I rent | which computer for fine-tuning | best card for training | "
        "recommend a gpu for llm fine-tuning | what hardware do I need to buy | hardware recommendation for a "
        "beginner | which nvidia card is good enough to train an 8b | is a 3090 still worth buying | 4090 or two "
        "3090 | 5090 or a used a6000 for training | should I get a mac studio or a pc with a gpu | which notebook "
        "with gpu is suited for lora | cheapest gpu that can train a 7b | gpu advice for a budget of 1000 euros | "
        "best value card for finetuning",
    ),
    "slimtune plan MODEL --gpu NAME": (
        "says whether a run fits, and how long it takes",
        "does it fit on my gpu | is my memory enough | enough vram | how much memory do I need | how much vram | "
        "will it run on my card | how long will it take on my gpu | minimum hardware requirements | what are the "
        "system requirements for training | can my laptop train a 7b | is 16 gb of vram sufficient to fine-tune an "
        "8b | is my 3060 able to fine-tune llama | can a 4070 train this | gpu memory requirement | estimate memory "
        "before training | calculate vram for fine-tuning | vram calculator | memory estimate of a run | what gpu "
        "size is necessary | how big a model can I train with my card | could I train a 13b on one 24 gb card | how "
        "many gigabytes of gpu memory for full fine-tuning | number of a100 needed for a 70b | formula for the "
        "required gpu memory | rule of thumb for how many gpus I need and what it costs | "
        "hardware requirements | minimum gpu for lora | does 32 GB suffice | gpu memory usage "
        "of training a 3b | expected memory consumption | peak memory of a fine-tuning run | memory space required "
        "for fine-tuning | estimate the number of gpus",
    ),
    "slimtune cost MODEL --gpu NAME": (
        "compares buying, renting and services",
        "how much does it cost to train | price of renting | cheaper to rent or to buy | dollars per run | cost of "
        "a cloud gpu | how expensive is training | when does renting beat buying | rent an h100 or buy a card | how "
        "many dollars to fine-tune a 7b | price of an a100 hour | total cost of a lora training | is it cheaper "
        "with runpod or vast.ai | cloud gpu price comparison | electricity cost of my own card against renting | "
        "what would it cost to train on aws | budget for fine-tuning an llm | does renting pay off",
    ),
}
"""Commands that answer questions: what each does, and questions that it answers."""
_DEFINITION = re.compile(
    r"(?:what (?:is|are|s)|whats|define|explain|meaning of|definition of)(?: me)? "
    r"(?:an? |the |word |term |point of |purpose of |use of )*(.+?)"
    r"(?: (?:good|used|useful) for| to me| mean| please| in simple terms| in simple words)*"
    r"|what do(?:es)? (?:an? |the )?(.+) (?:mean|do)"
)
_KIND = re.compile(r" (?:adapter|cache|file|format|method|model|number|quantization|token|training)$")
"""What a word of the glossary may be called beside its name: "a LoRA adapter"."""
_TRAILING_LINKS = re.compile(r"(?: (?:See |· )?\[[^\]]*\]\([^)]*\)\.?)+$")


@dataclass(frozen=True)
class QuestionGuide:
    """What answers a question that is no error."""

    answer: str
    """A command, or the heading of a section of Quick answers, of the glossary or of a lesson."""
    what: str
    """What the command does, or the text of the section."""

    @property
    def name(self) -> str:
        """What `slimtune explain` finds it by."""
        return self.answer


@dataclass(frozen=True)
class DocsSection:
    """A section of the docs, with the wordings under which it is asked for."""

    guide: QuestionGuide
    wordings: tuple[str, ...]


@cache
def load_docs_sections_by_heading() -> dict[str, DocsSection]:
    """Return the commands and all sections of Quick answers, the lessons and the glossary, by heading.

    The heading of a lesson's section has the lesson's title before it.
    """
    commands = [
        DocsSection(QuestionGuide(name, what), tuple(re.split(r"\s*\|\s*", asked)))
        for name, (what, asked) in COMMANDS.items()
    ]
    folder = _find_docs()
    found = [*commands, *_split_page(folder / "quick_answers.md", "###")]
    for file in sorted((folder / "learn").glob("*.md")):
        found += _split_page(file, "##")
    return {section.guide.answer: section for section in (*found, *load_terms().values())}


@cache
def load_wordings() -> dict[str, list[str]]:
    """Return questions in people's own words by the heading of the section that answers them."""
    return json.loads((Path(__file__).parent / "wordings.json").read_text(encoding="utf-8"))


@cache
def load_terms() -> dict[str, DocsSection]:
    """Return the glossary's definitions by word, in lower case."""
    sections = list(_split_page(_find_docs() / "glossary.md", "###"))
    other_words = {normalize_heading(words): section for section in sections for words in section.wordings}
    return other_words | {normalize_heading(section.guide.answer): section for section in sections}


def find_section_by_exact_heading(question: str) -> QuestionGuide | None:
    """Return the section that a text names by its heading, or the definition that it asks for; None if none.

    The heading of a lesson's section suffices if no other has it.
    """
    if guide := _load_headings().get(question.strip().lower()) or _load_headings().get(normalize_heading(question)):
        return guide
    asked = _DEFINITION.fullmatch(" ".join(re.findall(r"[a-z0-9]+", question.lower())))
    word = normalize_heading(asked[1] or asked[2]) if asked else ""
    term = load_terms().get(word) or load_terms().get(_KIND.sub("", word))
    return term.guide if term else None


@cache
def _load_headings() -> dict[str, QuestionGuide]:
    named: dict[str, QuestionGuide] = {}
    short: dict[str, list[QuestionGuide]] = {}
    for heading, section in load_docs_sections_by_heading().items():
        named[heading.lower()] = section.guide
        named.setdefault(normalize_heading(heading), section.guide)
        if ": " in heading:
            short.setdefault(normalize_heading(heading.split(": ", 1)[1]), []).append(section.guide)
    return {words: guides[0] for words, guides in short.items() if len(guides) == 1} | named


def normalize_heading(text: str) -> str:
    """Return a text in lower case, without signs and without the s of plurals."""
    return " ".join(word.rstrip("s") for word in re.findall(r"[^\W_]+", text.lower()))


def _find_docs() -> Path:
    here = Path(__file__).parent
    # A wheel has these pages beside the code (see pyproject.toml), a checkout in docs/.
    return next(path for path in (here / "docs", here.parents[3] / "docs") if path.is_dir())


def _split_page(file: Path, level: str) -> Iterator[DocsSection]:
    """Yield the sections of a page of the docs, without its links; a lesson's introduction has the lesson's title."""
    text = file.read_text(encoding="utf-8")
    title, is_lesson, is_code, heading = "", file.parent.name == "learn", False, ""
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if not is_code and line.startswith("# "):
            title = heading = line[2:]
        elif not is_code and line.startswith(f"{level} "):
            heading = f"{title}: {line[len(level) + 1 :]}" if is_lesson else line[len(level) + 1 :]
        elif not is_code and re.match("##? ", line):
            heading = ""
        elif heading and (is_lesson or heading != title):
            sections.setdefault(heading, []).append(line)
    for heading, lines in sections.items():
        guide = QuestionGuide(heading, _format_section("\n".join(lines)))
        yield DocsSection(guide, (heading, heading.split(": ")[-1], *load_wordings().get(heading, ())))


def _format_section(body: str) -> str:
    """Return a section with a line for each paragraph, and without its links, which lead to files of the docs."""
    blocks, is_code = [""], False
    for line in body.strip().splitlines():
        is_code ^= line.startswith("```")
        is_own = is_code or re.match(r"```|    |\||[-*] |\d+\. ", line) or not line.strip()
        if is_own or not blocks[-1] or re.match(r"```|    |\|", blocks[-1].rpartition("\n")[2]):
            blocks.append(line)
        else:
            blocks[-1] += f" {line.strip()}"
    text = "\n".join(_TRAILING_LINKS.sub("", line) for line in blocks[1:])
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\n{3,}", "\n\n", text)).strip()
