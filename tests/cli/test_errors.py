"""Results and exceptions become output and an exit code; exception chains say what ran out."""

import errno
import json
import warnings

import pytest
import typer
from typer.testing import CliRunner

from slimtune.cli.common import PACKAGE, CommandGroup, Json
from slimtune.errors import DataError, RecipeError, exception_chain, format_names, is_out_of_memory

app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, pretty_exceptions_enable=False)
raised: list[BaseException] = []


@app.command()
def work(size: int = 1, warning: str = "", as_json: Json = False) -> dict:
    print("text from a library")
    if warning:
        warnings.warn_explicit(warning, FutureWarning, str(PACKAGE / "core/config/recipe.py"), 1)
    for error in raised:
        raise error
    return {"size": size, "loss": float("nan")}


@app.command()
def other() -> None:
    pass


def call(*args: str, error: BaseException | None = None):
    raised[:] = [error] if error else []
    return CliRunner().invoke(app, list(args))


def test_result():
    done = call("work")
    assert (done.exit_code, done.stdout) == (0, "text from a library\n")
    done = call("work", "--json", "--size", "3")
    assert json.loads(done.stdout) == {"size": 3, "loss": None}, "one JSON object is all that stdout has"
    assert "text from a library" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (DataError("line 3 is no row", "a row", "mend it"), 1, "DataError", "line 3 is no row"),
        (RecipeError("two [bold]errors[/]", "none", "mend it"), 2, "RecipeError", "two [bold]errors[/]"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "RunError", "the disk is full: /x/y"),
        (ValueError("I/O error: No space left on device (os error 28)"), 1, "RunError", "the disk is full"),
        (MemoryError(), 1, "RunError", "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "RunError", "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "UsageError", "/root/x: no permission"),
        (KeyError("surprise"), 1, "SlimtuneError", "a bug in slimtune: KeyError: 'surprise'"),
        (KeyboardInterrupt(), 130, "Interrupted", "interrupted"),
    ],
)
def test_exception(error, code, kind, message):
    plain, as_json = call("work", error=error), call("work", "--json", error=error)
    assert (plain.exit_code, as_json.exit_code) == (code, code)
    assert plain.stdout == "text from a library\n"
    found = json.loads(as_json.stdout)["error"]
    assert found["kind"] == kind
    for text in (plain.stderr, as_json.stderr, found["message"]):
        assert message in text
    assert ("Traceback" in plain.stderr) == isinstance(error, KeyError), "only a bug shows its traceback"


def test_message_with_expected_and_hint():
    lines = call("work", error=DataError("what", "that", "how")).stderr.splitlines()
    assert lines == ["error: what", "  expected: that", "  hint: how", "  more: slimtune explain data-error"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["wrok"], "No such command 'wrok'. Did you mean 'work'?"),
        (["work", "--sise", "3"], "--size"),
        (["work", "--size", "many"], "Invalid value for '--size'"),
        (["work", "extra"], "unexpected extra argument"),
        (["work", "--size", "1", "--size=2"], "--size is given twice"),
    ],
)
def test_wrong_use(args, message):
    done = call(*args, "--json")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "--help`" in done.stderr or "leave one out" in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "UsageError"


def test_warning_is_one_line():
    assert call("work", "--warning", "outdated").stderr == "warning: outdated\n"


def test_exception_chain_ends_at_an_error_that_explains_its_cause():
    outer, middle, inner = ValueError("outer"), DataError("a row is faulty"), MemoryError()
    outer.__cause__, middle.__cause__ = middle, inner
    assert list(exception_chain(outer)) == [outer]
    assert not is_out_of_memory(outer)
    outer.__cause__, inner.__cause__ = inner, outer  # a cycle ends, too
    assert list(exception_chain(outer)) == [outer, inner]
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([1, 2], "'1', '2'"),
        (["a" * 20, "b" * 20], f"'{'a' * 20}', … (1 more)"),
        ([1, 2, 3, 4, 5], "'1', … (4 more)"),
        ([], ""),
    ],
)
def test_names_are_counted_only_where_that_is_shorter(names, text):
    assert format_names(names, 1) == text
