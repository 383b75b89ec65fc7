"""`slimtune serve RUN` at any free port, which it prints first; a token takes a tenth of a second."""

import sys
import time

from slimtune.cli import app
from slimtune.generation.model_runner import MultiAdapterRunner
from slimtune.serving.model_server import ModelServer

decode, run = MultiAdapterRunner.decode, ModelServer.run
MultiAdapterRunner.decode = lambda self, batch: (time.sleep(0.1), decode(self, batch))[1]


def announce_and_run(server: ModelServer) -> None:
    print(server.url.rpartition(":")[2].removesuffix("/v1"), file=sys.__stdout__, flush=True)  # --json redirects it
    run(server)


ModelServer.run = announce_and_run
app(args=["serve", sys.argv[1], "--port", "0", "--json"])
