"""`slimtune serve RUN` at any free port, which it prints first; the first token of an answer never comes."""

import sys
import threading

import torch

from slimtune.cli import app
from slimtune.generation.model_runner import MultiAdapterRunner
from slimtune.serving.model_server import ModelServer

run = ModelServer.run


def hang(*_: object) -> None:
    if sys.argv[2] == "lock":
        threading.Event().wait()
    while True:
        if sys.argv[2] == "kernel":
            torch.ones(2000, 2000) @ torch.ones(2000, 2000)


def announce_and_run(server: ModelServer) -> None:
    MultiAdapterRunner.decode = hang
    print(server.url.rpartition(":")[2].removesuffix("/v1"), file=sys.__stdout__, flush=True)  # --json redirects it
    run(server)


ModelServer.run = announce_and_run
app(args=["serve", sys.argv[1], "--port", "0", "--json"])
