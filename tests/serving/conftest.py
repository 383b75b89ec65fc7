"""A server over tiny runs in a thread of this process."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hand_run import make_run

from slimtune.serving.model_server import ModelServer, ServeSettings


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., ModelServer]]:
    """Start a server: `serve([runs], max_batch=2)`; its port is free, and it ends with the tests of the file."""
    started: list[tuple[ModelServer, threading.Thread]] = []

    def start(runs: list[Any], **settings: Any) -> ModelServer:
        server = ModelServer([str(run) for run in runs], ServeSettings(port=0, **settings))
        thread = threading.Thread(target=server.run)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, _ in started:
        server.stop()
    for _, thread in started:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("serving") / "tiny-base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base_folder: Path) -> Path:
    """A run with a LoRA of random weights."""
    return make_run(base_folder.parent / "sailor", base_folder)
