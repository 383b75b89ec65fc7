"""What the planner's tests share: real steps, measured by torch's own allocator events."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def referee():
    """benchmarks/plan_ways/referee.py."""
    file = Path(__file__).parents[2] / "benchmarks/plan_ways/referee.py"
    spec = importlib.util.spec_from_file_location("plan_referee", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
