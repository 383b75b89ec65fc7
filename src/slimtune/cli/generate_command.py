"""`slimtune generate` and `slimtune chat`: answers of the tuned model, or of base and tuned model side by side.

`slimtune predict`: classes of new texts by a trained classifier, or rewards by a reward model.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.cells import cell_len
from rich.text import Text
from typer import Argument, Option

from ..core.foundation.files import parse_json, read_regular_file
from ..core.foundation.formatting import escape_control_characters
from ..core.foundation.json_results import INLINE, OMIT_NONE
from ..errors import DataError, UsageError, suggest
from .column_flags import parse_column_flags
from .common import Device, Json, Run, make_console, make_error_console, make_table, showing_progress
from .input_checks import require_row_files_exist, require_run_and_base_exist

MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, Option(min=0.0, help="0: the most likely token; higher: more random.")]
SideBySide = Annotated[bool, Option("--side-by-side", help="Show the base's answer, too.")]
System = Annotated[str | None, Option(help="System message.")]
SHOWN_TEXT = 60
"""Characters of a text over its prediction, if there are several."""
NAMES = ("/new", "/help", "/exit")
COMMANDS = "/new starts over, /help shows this, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
_WIDE = "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef"
PARTS = re.compile(rf"\n| *[{_WIDE}]| *[^ \n{_WIDE}]+| +")
"""A line end, or a word with the spaces before it; a line may break beside every East Asian character."""
Seed = Annotated[int, Option(min=0, help="Seed of the random choices.")]


@dataclass(frozen=True)
class ModelAnswers:
    """The answers of both models to one message."""

    base: str | None = field(default=None, metadata=OMIT_NONE)
    """The base's answer, cut off where it was stopped; absent without --side-by-side."""
    tuned: str | None = field(default=None, metadata=OMIT_NONE)
    """The tuned model's answer, cut off where it was stopped; absent if the base's was stopped."""


@dataclass(frozen=True)
class GenerateResult:
    """What `generate --json` prints."""

    prompt: str
    """The user's message."""
    system: str | None
    """The system message; null: none is given."""
    temperature: float
    """Of the sampling; 0: the most likely token."""
    seed: int
    """Seed of the random choices."""
    answers: ModelAnswers = field(metadata=INLINE)
    """The answers."""


@dataclass(frozen=True)
class ChatTurn:
    """A line of the user and its answers."""

    user: str
    """The line."""
    answers: ModelAnswers = field(metadata=INLINE)
    """The answers."""


@dataclass(frozen=True)
class ChatResult:
    """What `chat --json` prints."""

    system: str | None
    """The system message; null: none is given."""
    temperature: float
    """Of the sampling; 0: the most likely token."""
    seed: int
    """Seed of the random choices."""
    turns: list[ChatTurn]
    """All turns, also those before a /new."""


def generate_answer(
    run: Run,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="The user's message.", show_default=False)],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    json_schema: Annotated[
        Path | None, Option(help="File with a JSON Schema that the answer satisfies.", show_default=False)
    ] = None,
    regex: Annotated[
        str | None, Option(help="Regular expression that the whole answer matches.", show_default=False)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> GenerateResult:
    """Answer one prompt."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    (turn,) = _converse(run, prompt, system, side_by_side, sampling, device, as_json, json_schema, regex)
    return GenerateResult(prompt, system, temperature, seed, turn.answers)


def chat_with_run(
    run: Run,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    side_by_side: SideBySide = False,
    system: System = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> ChatResult:
    """Hold a conversation, one line at a time.

    /new starts over, /help lists the commands, /exit or the end of the input (Ctrl-D) leaves, and Ctrl-C stops an
    answer. A line that begins with // is sent with one slash.
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    turns = _converse(run, None, system, side_by_side, sampling, device, as_json)
    return ChatResult(system, temperature, seed, turns)


def predict_rows(
    run: Run,
    texts: Annotated[list[str] | None, Argument(metavar="[TEXT]...", help="Texts.", show_default=False)] = None,
    data: Annotated[Path | None, Option(help="Rows with a text or messages, in place of TEXT.")] = None,
    out: Annotated[
        Path | None,
        Option(help="File for the rows of --data with their predictions, JSONL. [default: print them]"),
    ] = None,
    column: Annotated[
        list[str] | None,
        Option(help="Name of a column in --data: text=COLUMN. Repeatable. [default: those of the run's recipe]"),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> Any:
    """Predict the classes or rewards of new texts."""
    if bool(texts) == (data is not None) or (data is None and (out is not None or column)):
        raise UsageError(
            "predict takes texts, or --data",
            hint=f"slimtune predict {shlex.quote(str(run))} --data new.jsonl --out predicted.jsonl",
        )
    if as_json and data is not None and out is None:
        raise UsageError("--json with --data counts the rows that --out gets", "--out", "leave out --json: it is JSONL")
    columns = parse_column_flags(column or ())
    require_run_and_base_exist(run)
    require_row_files_exist(data)
    from ..core.data.rows import InvalidRow
    from ..core.foundation.files import to_json
    from ..core.training.trained_model import load_run
    from ..evaluation.predict import (
        PredictedText,
        TextPrediction,
        TextPredictions,
        parse_row_to_classify_or_error,
        predict_classes_or_rewards,
        predict_file,
        predict_records,
    )

    if data is not None and out is None:
        with showing_progress():
            records = predict_records(run, data, columns=columns, device=device)
        sys.stdout.write("".join(to_json(record) + "\n" for record in records))
        return None
    if data is not None and out is not None:
        with showing_progress():
            result = predict_file(run, data, out, columns=columns, device=device)
        if not as_json:
            rows = [(name, str(count)) for name, count in (result.classes or {}).items()]
            if result.mean_reward is not None:
                rows = [("mean reward", f"{result.mean_reward:.4f}")]
            make_console().print(make_table(f"{result.rows} rows in {out}", "", rows=rows))
        return result
    rows_to_classify = []
    for text in texts or ():
        row = parse_row_to_classify_or_error({"text": text})
        if isinstance(row, InvalidRow):
            raise DataError(f"the text {row.cause}", "a text")
        rows_to_classify.append(row)
    found = predict_classes_or_rewards(load_run(run, device=device), rows_to_classify)
    predicted = [PredictedText(text, prediction) for text, prediction in zip(texts or (), found, strict=True)]
    for each in predicted if not as_json else ():
        shares = each.prediction.probabilities or {"reward": float(each.prediction.reward or 0)}
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        heading = escape_control_characters(each.text)[:SHOWN_TEXT] if len(predicted) > 1 else ""
        make_console().print(make_table(heading, "", rows=[(name, f"{value:.4f}") for name, value in ordered]))
    if len(predicted) == 1:
        return TextPrediction(run=str(run), text=predicted[0].text, prediction=predicted[0].prediction)
    return TextPredictions(run=str(run), texts=predicted)


def _converse(
    run: Path,
    prompt: str | None,
    system: str | None,
    side_by_side: bool,
    sampling: dict[str, Any],
    device: str | None,
    as_json: bool,
    json_schema: Path | None = None,
    regex: str | None = None,
) -> list[ChatTurn]:
    """Answer a prompt, or the lines of a chat, printing the text as it comes; return them with the answers."""
    require_run_and_base_exist(run)
    lark = _make_grammar(json_schema, regex)
    from ..core.training.trained_model import load_run
    from ..generation.answer_grammar import GrammarCompiler
    from ..generation.answer_queue import SamplingParams
    from ..generation.conversation import Conversation
    from ..generation.generation_models import describe_trained_model, make_base_and_tuned_models
    from ..generation.run_requirements import require_causal_lm_run
    from ..generation.text_generator import TextGenerator

    require_causal_lm_run(run)
    trained = load_run(run, device=device)
    models, generator = make_base_and_tuned_models(trained), TextGenerator(trained.model)
    grammar = None
    if lark is not None:
        size = trained.model.config.get_text_config().vocab_size
        compiler, model = GrammarCompiler(), models["tuned"]
        grammar = compiler.compile_for_tokens(lark, model.tokenizer, model.end_tokens, size)

    def begin() -> dict[str, Conversation]:
        names = ("base", "tuned") if side_by_side else ("tuned",)
        return {name: Conversation(generator, models[name], system) for name in names}

    screen, params = make_console(stderr=as_json), SamplingParams(**sampling, grammar=grammar)
    turns: list[ChatTurn] = []
    conversations = begin()
    if prompt is None:
        _print_note(f"{describe_trained_model(trained)}\n{COMMANDS}")
    is_dialog = prompt is None and sys.stdin.isatty()
    for line in [prompt] if prompt is not None else _read_lines():
        if line is None:
            conversations = begin()
            continue
        answers: dict[str, str] = {}
        for name, conversation in conversations.items():
            label = f"{name}: " if side_by_side else ""
            screen.print(label, style="bold", end="")
            printer = AnswerPrinter(screen.file, len(label))
            answers[name], problem = "", ""
            try:
                with contextlib.closing(conversation.stream(line, params)) as pieces:
                    for piece in pieces:
                        answers[name] += piece
                        printer.write(piece)
            except (KeyboardInterrupt, UsageError) as error:
                if prompt is not None or (isinstance(error, UsageError) and not is_dialog):
                    raise
                problem = str(error) or "(stopped)"
            printer.close()
            screen.print()
            if problem:
                _print_note(problem)
            elif grammar is not None and conversation.finish_reason == "length":
                _print_note("(cut off before it was complete: --max-new-tokens)")
            elif not answers[name].strip():
                _print_note("(an empty answer: the model ended its turn at once)")
            if problem:
                break
        turns.append(ChatTurn(line, ModelAnswers(**answers)))
    return turns


def _make_grammar(json_schema: Path | None, regex: str | None) -> str | None:
    """Return the grammar that two flags ask for, None without them; raise UsageError if it is wrong."""
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and regex is not None:
        raise UsageError("--json-schema and --regex both say what the answer matches", "one of them")
    from ..generation.answer_grammar import make_json_schema_grammar, make_regex_grammar

    if regex is not None:
        return make_regex_grammar(regex)
    assert json_schema is not None
    try:
        schema = parse_json(read_regular_file(json_schema))
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{json_schema} cannot be read: {cause}", "a file with a JSON Schema") from error
    if not isinstance(schema, dict):
        raise UsageError(f"{json_schema} contains no JSON object", "a file with a JSON Schema")
    return make_json_schema_grammar(schema)


def _read_lines() -> Iterator[str | None]:
    """Yield the lines of the user that are not blank, None for /new; other commands are answered here."""
    interrupted = False
    while True:
        try:
            if sys.stdin.isatty():
                make_error_console().print("you: ", style="bold", end="")
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if interrupted or not sys.stdin.isatty():
                raise
            interrupted = True
            _print_note("\n/exit or Ctrl-D leaves, and so does Ctrl-C once more")
            continue
        interrupted, text = False, line.strip()
        if not line or text in ("/exit", "/quit"):
            return
        if text == "/help":
            _print_note(COMMANDS)
        elif re.fullmatch(r"/[a-z]\w*", text) and text != "/new":
            _print_note(f"there is no command {text}{suggest(text, NAMES)}\n{COMMANDS}")
        elif text:
            yield None if text == "/new" else text.removeprefix("/") if text.startswith("//") else text


def _print_note(text: str) -> None:
    make_error_console().print(Text(text, style="dim"))


class AnswerPrinter:
    """Prints pieces of text as they come; on a terminal no word breaks at its edge, and no escape sequence passes.

    A word is printed when it is complete. In a pipe the text stays as it is.
    """

    def __init__(self, file: Any, column: int = 0, width: int | None = None) -> None:
        self.file, self.column, self.pending = file, column, ""
        self.width = width or (make_console().width if file.isatty() else None)

    def write(self, piece: str) -> None:
        if self.width is None:
            self.file.write(piece)
        else:
            self.pending += escape_control_characters(piece.replace("\t", "    "))
            *complete, self.pending = PARTS.findall(self.pending) or [""]
            for part in complete:
                self._write_part(part)
        self.file.flush()

    def close(self) -> None:
        """Print the last word."""
        if self.pending:
            self._write_part(self.pending)
        self.pending = ""
        self.file.flush()

    def _write_part(self, part: str) -> None:
        """Print a word with the spaces before it, or a line end."""
        word = part.lstrip(" ")
        if part != "\n" and self.column and self.column + cell_len(part) > (self.width or 0):
            self.file.write("\n")
            self.column, part = 0, word
        self.file.write(part)
        self.column = 0 if part == "\n" else self.column + cell_len(part)
