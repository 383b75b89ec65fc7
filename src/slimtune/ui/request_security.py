"""Which requests the page answers: those that name this machine, come from the page itself and have the token.

Host      localhost or an address of this machine: a foreign name that resolves to it (DNS rebinding) is refused
Origin    of a form that is sent: the page's own, so that no other site can send one (CSRF)
token     in the address that the command prints, then in a cookie; as in Jupyter
size      of a request's body, counted while it arrives
"""

import ipaddress
import secrets
import socket
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from ..core.foundation.formatting import format_bytes
from ..extras.sockets import is_loopback, parse_host_header_or_none

COOKIE = "slimtune-ui"
MAX_FORM = 1 << 20
"""Bytes of a form without a file."""
HEADERS = {
    # Charts place their labels by style attributes; no script or style of a page's text can run.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "style-src-attr 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class RequestGuard:
    """ASGI middleware that refuses requests which the page must not answer.

    Args:
        app: the application.
        token: what a browser must send once as `?token=`, and then as a cookie.
        address: the address that the server is bound to.
        port: its port, part of the cookie's name: cookies of one host are shared by its ports.
        max_upload: bytes of a file that is uploaded, at `/upload`.
    """

    def __init__(self, app: Any, token: str, address: str, port: int, max_upload: int) -> None:
        self.app, self.token, self.address, self.max_upload = app, token, address, max_upload
        self.cookie = f"{COOKIE}-{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on with its body bounded and its answer's headers set."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        limit = self.max_upload if request.url.path == "/upload" else MAX_FORM
        answer = self.refuse(request) or self.log_in(request) or self.refuse_size(request, limit)
        if answer is not None:
            await answer(scope, receive, send_with_headers)
            return
        received = 0

        async def receive_bounded() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _describe_limit(limit))
            return message

        await self.app(scope, receive_bounded, send_with_headers)

    def refuse(self, request: Request) -> Response | None:
        """Return an answer for a foreign Host or Origin, and for a method that changes something without an Origin."""
        host = request.headers.get("host", "")
        if not is_own_host(host, self.address):
            return PlainTextResponse(f"the page is not served under the name {host[:100]!r}", 403)
        if request.method in ("GET", "HEAD"):
            return None
        if request.method != "POST":
            return PlainTextResponse("the page answers GET and POST", 405)
        origin = request.headers.get("origin")
        if origin is None and request.headers.get("sec-fetch-site") == "same-origin":
            return None
        if origin not in (f"http://{host}", f"https://{host}"):
            return PlainTextResponse("this form was not sent by the page of slimtune ui", 403)
        return None

    def log_in(self, request: Request) -> Response | None:
        """Return the answer that sets the cookie for the right token, or that asks for one; None with the cookie."""
        given = request.query_params.get("token")
        if given is not None and secrets.compare_digest(given.encode(), self.token.encode()):
            # A path that begins with two slashes would be an address of another server.
            url = request.url.remove_query_params("token")
            path = "/" + url.path.lstrip("/\\")
            answer: Response = RedirectResponse(f"{path}?{url.query}" if url.query else path, 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", path="/")
            return answer
        known = request.cookies.get(self.cookie, "")
        if secrets.compare_digest(known.encode(), self.token.encode()):
            return None
        wrong = "This token is wrong. " if given is not None else ""
        text = f"{wrong}Open the address that `slimtune ui` printed: it ends in ?token=…"
        return PlainTextResponse(text, 403)

    def refuse_size(self, request: Request, limit: int) -> Response | None:
        """Return an answer for a body that is announced as larger than `limit` bytes."""
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limit:
            return PlainTextResponse(_describe_limit(limit), 413)
        return None


def _describe_limit(limit: int) -> str:
    """Return what is said of a body that is too large."""
    return f"the request is too large: the page takes {format_bytes(limit)}; copy a larger file into the working folder"


def is_own_host(host: str, address: str) -> bool:
    """Return whether a Host header names this machine as the server at `address` may be called.

    That is localhost, or an IP address, which no foreign name server can point elsewhere. Names of this machine count
    if the server is bound to more than itself.
    """
    name = (parse_host_header_or_none(host) or "").strip("[]")
    local = is_loopback(address)
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or (not local and name in {address.lower(), socket.gethostname().lower()})
    return ip.is_loopback or not local
