"""Base and tuned model answer the same held-out prompts, and checks measure the answers.

Every prompt is answered alone with greedy decoding, so an answer equals what `slimtune generate` prints. In a batch an
answer would depend on its neighbours: matrix products of another shape round differently in bf16, and one different
token changes all that follow.

    tokens          number of tokens, including the one that ends the answer      (always measured)
    repetition      share of 4-word sequences that occurred before in the answer  (always measured)
    ended           the answer ended before --max-new-tokens                      (always measured)
    exact           the answer equals the reference, apart from surrounding white space
    chrf            chrF against the reference, 0 to 100 (sacrebleu)
    json            the answer is JSON and nothing else
    regex:PATTERN   PATTERN occurs in the answer
    json-schema:F   the answer is JSON that satisfies the schema in file F (jsonschema)
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.data.collator import Example
from ..core.data.messages import Message
from ..core.data.rows import Row
from ..core.foundation.progress_bars import track_progress
from ..errors import ModelError, UsageError, format_install_command, suggest
from ..generation.answer_queue import GeneratedAnswer, SamplingParams
from ..generation.generation_models import GenerationModel
from ..generation.text_generator import TextGenerator
from .eval_result import AnswerPair, BaseAndTunedAnswerMeasure

Check = Callable[[str, str], bool | float]
"""Maps answer and reference to a measurement."""
CHECK_NAMES = ("exact", "chrf", "json", "regex:PATTERN", "json-schema:FILE")


class EvalPrompt(NamedTuple):
    """A held-out prompt: the messages before a row's last answer, and that answer."""

    messages: list[Message]
    reference: str
    line: int


def select_eval_prompts(rows: Iterable[Row], examples: Sequence[Example], count: int) -> list[EvalPrompt]:
    """Return up to `count` prompts, spread evenly over the evaluated rows.

    Raises:
        UsageError: a row is no conversation that ends with an answer in words.
    """
    indices = np.unique(np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int))
    lines = {examples[int(i)]["line"] for i in indices}
    prompts = []
    for row in (row for row in rows if row.line in lines):
        answers = [i for i, m in enumerate(row.messages) if m["role"] == "assistant" and m.get("content")]
        if not answers or row.tools:
            expected = "messages that end with an assistant's answer in words, without tools"
            raise UsageError(f"the row of line {row.line} cannot be asked again", expected, "leave --generate out")
        prompts.append(EvalPrompt(row.messages[: answers[-1]], row.messages[answers[-1]]["content"], row.line))
    return prompts


def generate_base_and_tuned_answers(
    generator: TextGenerator,
    models: Mapping[str, GenerationModel],
    prompts: Sequence[EvalPrompt],
    checks: Mapping[str, Check],
    max_new_tokens: int,
) -> list[AnswerPair]:
    """Return the answers of both models, "base" and "tuned", to each prompt, with their checks."""
    pairs = []
    for prompt in track_progress(prompts, "answers of base and tuned model"):
        texts: dict[str, str] = {}
        measured: dict[str, dict[str, bool | float]] = {n: {} for n in ("tokens", "repetition", "ended", *checks)}
        for who, model in models.items():
            ids = model.tokenize_prompt(prompt.messages, max_new_tokens)
            answer = GeneratedAnswer(model, ids, SamplingParams(max_new_tokens))
            generator.generate([answer])
            texts[who] = answer.text
            measured["tokens"][who], measured["ended"][who] = answer.num_tokens, answer.finish_reason == "stop"
            measured["repetition"][who] = measure_repetition(answer.text)
            for name, check in checks.items():
                measured[name][who] = check(answer.text, prompt.reference)
        pairs.append(
            AnswerPair(
                line=prompt.line,
                prompt=prompt.messages,
                reference=prompt.reference,
                base=texts["base"],
                tuned=texts["tuned"],
                checks={name: BaseAndTunedAnswerMeasure(**values) for name, values in measured.items()},
            )
        )
    return pairs


def average_answer_checks(answers: Sequence[AnswerPair]) -> dict[str, BaseAndTunedAnswerMeasure]:
    """Return the mean of each check for base and tuned model; for checks that are true or false, the share."""
    return {
        name: BaseAndTunedAnswerMeasure(
            base=float(np.mean([a.checks[name].base for a in answers])),
            tuned=float(np.mean([a.checks[name].tuned for a in answers])),
        )
        for name in answers[0].checks
    }


def measure_repetition(text: str) -> float:
    """Return the share of a text's 4-word sequences that occurred in it before, 0 to 1."""
    words = text.split()
    sequences = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def build_answer_check(name: str) -> Check:
    """Return the check that a name stands for.

    Raises:
        UsageError: the name is unknown, or a pattern or schema is invalid.
        ModelError: a package is missing.
    """
    kind, _, argument = name.partition(":")
    match kind, bool(argument):
        case "exact", False:
            return lambda answer, reference: answer.strip() == reference.strip()
        case "json", False:
            return lambda answer, _: _parse_json(answer) is not None
        case "regex", True:
            try:
                pattern = re.compile(argument)
            except re.error as e:
                raise UsageError(f"{argument!r} is not a regular expression: {e}", "Python's re syntax") from e
            return lambda answer, _: pattern.search(answer) is not None
        case "chrf", False:
            metric = _import("sacrebleu.metrics.chrf", kind).CHRF()
            return lambda answer, reference: metric.sentence_score(answer, [reference]).score
        case "json-schema", True:
            validator = _load_schema(Path(argument))
            return lambda answer, _: (parsed := _parse_json(answer)) is not None and validator.is_valid(parsed[0])
    raise UsageError(f"there is no check {name!r}{suggest(kind, CHECK_NAMES)}", f"one of {', '.join(CHECK_NAMES)}")


def _load_schema(file: Path) -> Any:
    """Return the validator of the JSON schema in a file."""
    jsonschema = _import("jsonschema", "json-schema")
    try:
        schema = json.loads(file.read_text())
        validator_class = jsonschema.validators.validator_for(schema)
        validator_class.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as e:
        first_line = str(e).partition("\n")[0]
        raise UsageError(f"{file} is not a valid JSON schema: {first_line}", "a file with one JSON schema") from e
    return validator_class(schema)


def _parse_json(answer: str) -> tuple[Any] | None:
    """Return the parsed value in a tuple (it may be null), or None if the answer is not JSON."""
    try:
        return (json.loads(answer),)
    except (json.JSONDecodeError, RecursionError):
        return None


def _import(module: str, check: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        message = f"the check {check} needs the package {module.partition('.')[0]}, which is not installed"
        raise ModelError(message, hint=format_install_command("eval")) from e
