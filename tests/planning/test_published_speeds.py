"""The published speeds that the package has are those of benchmarks/data, and `benchmarks` lists them."""

import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from slimtune.errors import UsageError
from slimtune.planning.gpu_specs import find_gpus_by_name
from slimtune.planning.published_speeds import list_published_speeds, load_published_speeds

ROOT = Path(__file__).parents[2]


@cache
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/internals/make_published_speeds.py"))


def test_tables_are_fresh():
    stale = [file.name for file, text in script()["make_tables"]().items() if file.read_text("utf-8") != text]
    assert stale == [], "run python docs/internals/make_published_speeds.py"


@pytest.mark.slow
def test_page_is_fresh():
    assert script()["PAGE"].read_text("utf-8") == script()["make_page"]()


def test_every_speed_is_of_a_known_gpu():
    assert all(find_gpus_by_name(s.gpu) for s in load_published_speeds())
    assert len(load_published_speeds()) > 800


def test_speeds_of_a_gpu_and_a_base():
    speeds = list_published_speeds("4090", "llama-3.1-8b", "llama.cpp")
    assert {(s.gpu, s.model, s.engine) for s in speeds} == {("rtx-4090", "llama-3.1-8b", "llama.cpp")}
    for wrong in ({"gpu": "rtx-9999"}, {"model": "no-such-base"}, {"engine": "abacus"}, {"gpu": "gtx-1060-6gb"}):
        with pytest.raises(UsageError):
            list_published_speeds(**wrong)


def test_command(slimtune):
    printed = json.loads(slimtune("benchmarks", "--gpu", "rtx-5090", "--json").stdout)
    assert {s["gpu"] for s in printed["speeds"]} == {"rtx-5090"}
    assert slimtune("benchmarks", "--gpu", "rtx-5090", "--sources").exit_code == 0
    assert slimtune("benchmarks").exit_code == 0
