"""Results and exceptions become output and an exit code; exception chains say what ran out."""

import errno
import json
import warnings

import pytest
import typer
from typer.testing import CliRunner

from slimtune.cli.common import PACKAGE, CommandGroup, Json
from slimtune.errors import DataError, RecipeError, exception_chain, is_out_of_memory

app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, pretty_exceptions_enable=False)
errors: list[BaseException] = []
texts: list[str] = []


@app.command()
def work(size: int = 1, as_json: Json = False) -> dict:
    print("noise from a library")
    for text in texts:
        warnings.warn_explicit(text, FutureWarning, str(PACKAGE / "config/aliases.py"), 1)
    for error in errors:
        raise error
    return {"size": size, "loss": float("nan")}


@app.command()
def other() -> None:
    pass


def call(*args: str, error: BaseException | None = None, warning: str = ""):
    errors[:] = [error] if error else []
    texts[:] = [warning] if warning else []
    return CliRunner().invoke(app, list(args))


def test_a_result():
    done = call("work")
    assert (done.exit_code, done.stdout) == (0, "noise from a library\n")


def test_json_is_exactly_one_object_on_stdout():
    done = call("work", "--json", "--size", "3")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"size": 3, "loss": None}
    assert "noise" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "kind", "says"),
    [
        (DataError("line 3 is no row", "a row", "mend it"), 1, "DataError", "line 3 is no row"),
        (RecipeError("two [bold]faults[/]", "none", "mend it"), 2, "RecipeError", "two [bold]faults[/]"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "RunError", "the disk is full: /x/y"),
        (ValueError("I/O error: No space left on device (os error 28)"), 1, "RunError", "the disk is full"),
        (MemoryError(), 1, "RunError", "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "RunError", "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "UsageError", "no permission: /root/x"),
        (KeyError("surprise"), 1, "SlimtuneError", "a bug in slimtune: KeyError: 'surprise'"),
        (KeyboardInterrupt(), 130, "Interrupted", "interrupted"),
    ],
)
def test_an_exception_becomes_a_message_and_a_code(error, code, kind, says):
    plain = call("work", error=error)
    assert plain.exit_code == code
    assert says in plain.stderr
    assert plain.stdout == "noise from a library\n"
    asked = call("work", "--json", error=error)
    assert asked.exit_code == code
    said = json.loads(asked.stdout)["error"]
    assert said["kind"] == kind
    assert says in said["message"]
    assert says in asked.stderr


def test_the_message_has_expected_and_hint():
    lines = call("work", error=DataError("got this", "that", "do so")).stderr.splitlines()
    assert lines == ["error: got this", "  expected: that", "  hint: do so"]


def test_only_a_bug_shows_a_traceback():
    assert "Traceback" in call("work", error=KeyError("x")).stderr
    assert "Traceback" not in call("work", error=DataError("x")).stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["wrok"], "No such command 'wrok'. Did you mean 'work'?"),
        (["work", "--sise", "3"], "--size"),
        (["work", "--size", "many"], "Invalid value for '--size'"),
        (["work", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_use_is_exit_code_2(args, says):
    done = call(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "--help`" in done.stderr
    asked = call(*args, "--json")
    assert asked.exit_code == 2
    assert json.loads(asked.stdout)["error"]["kind"] == "UsageError"


def test_a_warning_is_one_line():
    lines = call("work", warning="old is an old name").stderr.splitlines()
    assert lines == ["warning: old is an old name"]


def test_exception_chain_ends_at_an_error_that_explains_its_cause():
    outer, middle, inner = ValueError("outer"), DataError("a row is faulty"), MemoryError()
    outer.__cause__, middle.__cause__ = middle, inner
    assert list(exception_chain(outer)) == [outer]
    assert not is_out_of_memory(outer)
    outer.__cause__, inner.__cause__ = inner, outer  # a cycle ends, too
    assert list(exception_chain(outer)) == [outer, inner]
    assert is_out_of_memory(outer)
