"""The server of the page: a socket that is bound before anything is printed, and uvicorn on it."""

import importlib
import os
import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from ..extras.http_connections import GuardedHttpConnection, GuardedHttpServer
from ..extras.sockets import format_server_address, is_loopback, open_listening_socket
from .command_jobs import StartedCommand
from .pages import UiPages
from .request_security import RequestGuard
from .web_app import build_web_app
from .workspace import WorkspaceFolder

CONNECTIONS = 64
"""Most requests at a time; a browser's tab has at most six."""


def serve_web_page(
    folder: Path,
    *,
    host: str,
    port: int,
    max_upload: int,
    announce: Callable[[str, bool], None],
    plannable_gpus: Sequence[tuple[str, int]] = (),
) -> tuple[str, list[StartedCommand]]:
    """Serve the page of a folder until Ctrl-C; return its address and the trainings that go on.

    Args:
        folder: the working folder.
        host: address to bind to.
        port: its port; 0: one that is free.
        max_upload: bytes of a file that is uploaded.
        announce: gets the page's address with its token, and whether only this machine reaches it.
        plannable_gpus: name and bytes of memory of each GPU that a plan can be made for.

    Raises:
        UsageError: the address or port cannot be bound.
    """
    sock = open_listening_socket(host, port)
    port = sock.getsockname()[1]
    token = os.environ.get("SLIMTUNE_UI_TOKEN") or secrets.token_urlsafe(24)  # 192 random bits
    pages = UiPages(WorkspaceFolder(folder), gpus=plannable_gpus)
    app = RequestGuard(build_web_app(pages), token, host, port, max_upload)
    settings = uvicorn.Config(
        app, http=GuardedHttpConnection, log_level="error", access_log=False, limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30, ws="none", lifespan="off", server_header=False, timeout_graceful_shutdown=3,
    )  # fmt: skip
    url = f"{format_server_address(sock)}/?token={token}"
    announce(url, is_loopback(host))
    # The first recipe of a run that is read imports torch, for seconds; nobody has to wait for the address meanwhile.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        GuardedHttpServer(settings).run(sockets=[sock])
    except KeyboardInterrupt:  # uvicorn has shut down and passes Ctrl-C on
        pass
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the page ends already: one more would end it by the signal
        trainings = pages.close()
        sock.close()
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
    return url, trainings
