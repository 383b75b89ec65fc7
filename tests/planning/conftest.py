"""What the planner's tests share: programs of benchmarks/, and real steps, measured by torch's own allocator events."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "plan_ways")]


@pytest.fixture(scope="session")
def referee() -> ModuleType:
    """benchmarks/plan_ways/referee.py."""
    return import_module("referee")
