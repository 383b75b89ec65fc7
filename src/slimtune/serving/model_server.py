"""The process that serves: its port, its signals and its end."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import uvicorn

from ..core.foundation.device import release_unused_memory
from ..errors import RunError, UsageError
from ..export.export_results import EngineVerdict
from ..extras.http_connections import GuardedHttpConnection, GuardedHttpServer
from ..extras.sockets import format_server_address, is_loopback, open_listening_socket
from ..generation.answer_queue import BaseAnswerQueue
from ..generation.text_generator import TextGenerator
from .adapter_loading import AdapterLoader
from .llama_cpp_server import start_llama_cpp_server
from .openai_api import OpenAiApi
from .served_models import (
    ServedModel,
    load_base_without_runs,
    load_served_models_and_first_run,
    parse_run_names,
)

ServingEngineName = Literal["torch", "llama.cpp"]
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
    engine: ServingEngineName = "torch"
    precision: str | None = None  # of the base in llama.cpp
    verify: bool = True  # compare llama.cpp with the adapters
    base: str | None = None  # serve this base, if there are no runs
    dtype: str = "auto"  # of such a base
    adapters_from: Path | None = None  # requests may load adapters below this folder; None: they may not


class ModelServer:
    """An OpenAI-compatible server for the adapters of runs and their base.

    Args:
        runs: `RUN` or `NAME=RUN` for each.
        settings: where it listens, its limits, and the engine that generates the answers.
        progress: gets messages while the engine starts.

    Raises:
        UsageError: the port is taken, the host needs an API key, or as for `load_served_models_and_first_run` and
            `start_llama_cpp_server`.
    """

    def __init__(
        self, runs: Sequence[str], settings: ServeSettings, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.settings = settings
        if not is_loopback(settings.host) and not settings.api_key:
            raise UsageError(
                f"--host {settings.host} lets other machines use the server, and there is no API key",
                "an --api-key, or --host 127.0.0.1",
                "set SLIMTUNE_API_KEY, which other users of this machine cannot see as they see a flag",
            )
        named = parse_run_names(runs)
        self._socket = open_listening_socket(settings.host, settings.port)
        self.queue: BaseAnswerQueue
        self.unshared: list[ServedModel] = []
        self.checks: list[EngineVerdict] = []
        self.adapter_loader: AdapterLoader | None = None
        self.has_ended = True  # False: a thread hangs in a step, and was left behind
        try:
            if settings.engine == "torch":
                self._start_torch(named)
            else:
                self._start_llama_cpp(named, progress)
        except BaseException:
            self._socket.close()
            raise
        hosts = ("localhost", "127.0.0.1", "[::1]", settings.host) if is_loopback(settings.host) else ()
        config = uvicorn.Config(
            OpenAiApi(self.models, self.queue, hosts, settings.api_key, settings.timeout, self.adapter_loader).build(),
            http=GuardedHttpConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # each request that is no HTTP would be a warning
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.max_batch + settings.max_waiting + 100,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS + 5,
        )
        self._uvicorn = _UvicornServer(config, self.queue)

    def _start_torch(self, runs: dict[str, Path]) -> None:
        s = self.settings
        if s.base is None:
            self.models, trained = load_served_models_and_first_run(runs, device=s.device, max_length=s.max_length)
        else:
            self.models, trained = load_base_without_runs(
                s.base, dtype=s.dtype, device=s.device, max_length=s.max_length
            )
        generator = TextGenerator(trained.model, max_batch=s.max_batch, max_waiting=s.max_waiting)
        self.runner, self.queue = generator.runner, generator
        self.cache_bytes = self.runner.measure_cache() * s.max_batch * max(m.max_length for m in self.models)
        self.unshared = [m for m in self.models if not self.runner.shares_batches(m.adapter_or_base)]
        if s.adapters_from is not None:
            self.adapter_loader = AdapterLoader(trained, generator, s.adapters_from, s.max_length)
        generator.start()

    def _start_llama_cpp(self, runs: dict[str, Path], progress: Callable[[str], None]) -> None:
        s = self.settings
        self.models, self.queue, self.checks, self.cache_bytes = start_llama_cpp_server(
            runs, max_batch=s.max_batch, max_waiting=s.max_waiting, max_length=s.max_length, precision=s.precision,
            verify=s.verify, device=s.device, progress=progress,
        )  # fmt: skip
        release_unused_memory(torch.device("cpu"))  # of the model that was compared

    @property
    def url(self) -> str:
        """The address for OpenAI's clients."""
        return f"{format_server_address(self._socket)}/v1"

    def run(self) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`; `queue` then knows how many answers and tokens were generated.

        Raises:
            RunError: the thread that generates answers has ended by an error.
            KeyboardInterrupt: a second Ctrl-C cut off answers that were still being generated.
        """
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises a signal again after its own shutdown, which would end the process with another exit code.
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            if self._uvicorn.force_exit:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third Ctrl-C does not wait for the step that runs
            self.has_ended = self.queue.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if (failure := self.queue.failure) is not None:
            message = f"the thread that generates answers has ended by an error: {type(failure).__name__}: {failure}"
            raise RunError(message, hint="the lines above say where; start the server again") from failure
        if self._uvicorn.force_exit:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Let `run` return; another thread may call it."""
        self._uvicorn.should_exit = True


class _UvicornServer(GuardedHttpServer):
    """Lets answers go on for some seconds after a signal; the others get an error before connections are closed.

    It also ends when no answer can be generated any more.
    """

    def __init__(self, config: uvicorn.Config, queue: BaseAnswerQueue) -> None:
        super().__init__(config)
        self._queue = queue

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._queue.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async def close_late() -> None:
            await asyncio.sleep(SHUTDOWN_SECONDS)
            await asyncio.to_thread(self._queue.close)

        closing = asyncio.ensure_future(close_late())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()
