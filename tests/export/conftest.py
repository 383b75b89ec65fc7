"""A Hub on this machine."""

from collections.abc import Iterator

import pytest
from hub_server import Hub, serve_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as hub:
        yield hub
