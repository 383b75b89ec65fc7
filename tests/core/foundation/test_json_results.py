"""Results as dataclasses: written as JSON, read back, and described by a schema."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonschema
import pytest

from slimtune.cli.json_schemas import make_json_schema, read_field_docstrings
from slimtune.core.foundation.json_results import (
    INLINE,
    OMIT_NONE,
    from_json_dict,
    make_json_key_metadata,
    to_json_dict,
)


@dataclass(frozen=True)
class Versions:
    """The versions of the packages."""

    torch: str
    """PyTorch's."""
    python: str = "3.11"


@dataclass(frozen=True)
class Result:
    """What a run returned."""

    steps: int
    """Optimizer steps."""
    loss: float | None
    """Mean over the last steps,
    in nats."""
    verdict: Literal["fits", "tight"]
    folder: Path
    versions: Versions
    rows: list[tuple[float, str]] = field(default_factory=list)
    margin: float | None = field(default=None, metadata=make_json_key_metadata("rewards/margin"))
    skipped: int | None = field(default=None, metadata=OMIT_NONE)
    measures: Mapping[str, float] = field(default_factory=dict, metadata=INLINE)


def a_result(**changes: Any) -> Result:
    return Result(**{
        "steps": 3, "loss": 0.5, "verdict": "fits", "folder": Path("runs/a"), "versions": Versions("2.9"),
        "rows": [(1.0, "a")], "measures": {"ppl": 2.0}, **changes,
    })  # fmt: skip


def test_written_values_are_plain_and_in_the_order_of_the_fields():
    assert to_json_dict(a_result(loss=math.nan)) == {
        "steps": 3, "loss": None, "verdict": "fits", "folder": "runs/a",
        "versions": {"torch": "2.9", "python": "3.11"}, "rows": [[1.0, "a"]], "rewards/margin": None, "ppl": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"skipped": 2, "loss": None}, {"rows": [], "measures": {}}, {"margin": 1.5}])
def test_what_was_written_is_read_back(changes):
    result = a_result(**changes)
    assert from_json_dict(Result, to_json_dict(result)) == result


@pytest.mark.parametrize("changes", [{}, {"skipped": 2, "loss": None}, {"rows": [], "measures": {}}])
def test_what_was_written_fits_the_schema(changes):
    jsonschema.validate(to_json_dict(a_result(**changes)), make_json_schema(Result))


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("steps", "3", "steps"),
        ("steps", True, "steps"),
        ("loss", "low", "loss"),
        ("verdict", "no", "verdict"),
        ("versions", {"torch": 2}, "versions.torch"),
        ("versions", {}, "versions.torch"),
        ("versions", {"torch": "2", "cuda": "12"}, "versions.cuda"),
        ("versions", [], "versions"),
        ("rows", [[1.0]], "rows[0]"),
        ("rows", [[1.0, 2.0]], "rows[0][1]"),
        ("extra", "text", "extra"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(key, value, where):
    with pytest.raises(ValueError) as error:
        from_json_dict(Result, {**to_json_dict(a_result()), key: value})
    assert str(error.value).startswith(f"{where}:")


def test_a_tolerant_reader_takes_defaults_for_what_it_cannot_read():
    values = to_json_dict(a_result()) | {"loss": "low", "rows": 3, "versions": {"torch": "2.9", "cuda": "12"}}
    del values["rewards/margin"]
    assert from_json_dict(Result, values, strict=False) == a_result(loss=None, rows=[])
    with pytest.raises(ValueError, match="steps"):
        from_json_dict(Result, values | {"steps": "many"}, strict=False)


def test_the_schema_has_the_docs_of_the_fields():
    schema = make_json_schema(Result)
    assert schema["properties"]["loss"] == {
        "type": ["number", "null"],
        "description": "Mean over the last steps,\nin nats.",
    }
    assert schema["properties"]["versions"]["properties"]["torch"]["description"] == "PyTorch's."
    assert schema["additionalProperties"] == {"type": "number"}
    assert "skipped" not in schema["required"]
    assert "loss" in schema["required"]
    assert read_field_docstrings(Result)["steps"] == "Optimizer steps."


@dataclass(frozen=True)
class Interval:
    """A figure with its interval."""

    json_suffixes: ClassVar = {"value": "", "ends": "_ends"}

    value: float
    ends: tuple[float, float]
    """From low to high."""


@dataclass(frozen=True)
class Pairs:
    """What is measured on pairs."""

    pairs: int
    margin: Interval


@dataclass(frozen=True)
class Measured:
    """Losses, and what is measured on pairs, if there are any."""

    loss: Interval
    """The loss."""
    other: Interval | None
    inside: Pairs | None = field(default=None, metadata=INLINE)


@pytest.mark.parametrize("inside", [None, Pairs(3, Interval(0.5, (0.25, 0.75)))])
def test_parts_of_a_value_are_keys_of_their_own(inside):
    result = Measured(Interval(1.0, (0.5, 1.5)), None, inside)
    values = to_json_dict(result)
    start = {"loss": 1.0, "loss_ends": [0.5, 1.5], "other": None, "other_ends": None}
    assert values == start | ({"pairs": 3, "margin": 0.5, "margin_ends": [0.25, 0.75]} if inside else {})
    assert from_json_dict(Measured, values) == result
    schema = make_json_schema(Measured)
    jsonschema.validate(values, schema)
    assert schema["required"] == list(start)
    assert schema["properties"]["loss_ends"]["description"] == "The loss. From low to high."
