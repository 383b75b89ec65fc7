"""The process that serves: its port, its signals and its end."""

import asyncio
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from ..errors import UsageError
from ..utils.sockets import bind_socket
from .app import App, AppSettings
from .continuous_batching import ContinuousBatching
from .models import load_models, name_runs
from .runner import ModelRunner

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_SECONDS = 10
"""How long answers may go on after a signal to end."""


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, and its limits."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None
    device: str | None = None
    max_batch: int = 16  # most answers that are generated at the same time
    max_waiting: int = 256  # most answers that wait
    max_length: int = 4096  # most tokens of a prompt and its answer
    timeout: float = 600  # seconds from a request to the end of its answer


class ModelServer:
    """An OpenAI-compatible server for the adapters of runs and their base.

    Args:
        runs: `RUN` or `NAME=RUN` for each.
        settings: where it listens, and its limits.

    Raises:
        UsageError: the port is taken, the host needs an API key, or as for `load_models`.
    """

    def __init__(self, runs: Sequence[str], settings: ServeSettings) -> None:
        self.settings = settings
        if settings.host not in LOOPBACK and not settings.api_key:
            raise UsageError(
                f"--host {settings.host} lets other machines use the server, and there is no API key",
                "an --api-key, or --host 127.0.0.1",
                "set SLIMTUNE_API_KEY, which other users of this machine cannot see as they see a flag",
            )
        named = name_runs(runs)
        self._socket = bind_socket(settings.host, settings.port)
        try:
            self.models, trained = load_models(named, device=settings.device, max_length=settings.max_length)
        except BaseException:
            self._socket.close()
            raise
        self.runner = ModelRunner(trained.model)
        self.cache_bytes = self.runner.measure_cache() * settings.max_batch * max(m.max_length for m in self.models)
        self.unshared = [m for m in self.models if not self.runner.shares_batches(m.adapter)]
        self.batching = ContinuousBatching(self.runner, max_batch=settings.max_batch, max_waiting=settings.max_waiting)
        is_local = settings.host in LOOPBACK
        access = AppSettings(
            hosts=("localhost", "127.0.0.1", "[::1]") if is_local else (),
            api_key=settings.api_key,
            timeout=settings.timeout,
        )
        config = uvicorn.Config(
            App(self.models, self.batching, access).build(),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.max_batch + settings.max_waiting + 100,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS + 5,
        )
        self._uvicorn = _UvicornServer(config, self.batching)

    @property
    def url(self) -> str:
        """The address for OpenAI's clients."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> dict[str, Any]:
        """Serve until Ctrl-C, SIGTERM or `stop`; return how many answers and tokens were generated."""
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises a signal again after its own shutdown, which would end the process with another exit code.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self.batching.close()
        return {"answers": self.batching.finished, "tokens": self.batching.generated_tokens}

    def stop(self) -> None:
        """Let `run` return; another thread may call it."""
        self._uvicorn.should_exit = True


class _UvicornServer(uvicorn.Server):
    """Lets answers go on for some seconds after a signal; the others get an error before connections are closed."""

    def __init__(self, config: uvicorn.Config, batching: ContinuousBatching) -> None:
        super().__init__(config)
        self._batching = batching

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def close_late() -> None:
            await asyncio.sleep(SHUTDOWN_SECONDS)
            await asyncio.to_thread(self._batching.close)

        closing = asyncio.ensure_future(close_late())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
