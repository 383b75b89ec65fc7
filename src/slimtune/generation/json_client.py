"""Requests to a server that the user named, with JSON in both directions: a judge, vLLM, llama.cpp."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..core.foundation.files import parse_json
from ..core.foundation.formatting import escape_control_characters
from ..errors import ModelError, RunError


class _RefuseRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the key and the texts are for the address that the user named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class JsonClient:
    """Sends JSON to a server and reads the JSON of its answers."""

    name: str  # for messages, such as "sampler"
    url: str
    key: str | None = None  # sent as a bearer token
    timeout: float = 300.0  # seconds for one answer, in whole
    max_bytes: int = 1 << 30  # of one answer
    hint: str = ""  # for the user if nobody answers

    def request(self, path: str, body: Any = None) -> Any:
        """Send JSON by POST (without a body: by GET), and return the JSON of the answer.

        Raises:
            RunError: the server refuses the request.
            ModelError: no such server answers there in time, or it does not accept the key.
        """
        end, content = time.monotonic() + self.timeout, bytearray()
        with self._open(path, body) as answer:
            while piece := answer.read1(1 << 16):
                content += piece
                if time.monotonic() > end:
                    raise TimeoutError
                if len(content) > self.max_bytes:
                    raise ModelError(f"the {self.name} at {self.url} sends more than {self.max_bytes} bytes")
        try:
            return parse_json(bytes(content))
        except ValueError as error:
            message = f"what answers at {self.url}{path} is not a {self.name}: it sends no JSON ({error})"
            raise ModelError(message) from error

    def stream(self, path: str, body: Any) -> Generator[dict[str, Any], None, None]:
        """Send JSON by POST, and yield the server-sent events of the answer; closing the generator ends the request.

        `timeout` is that of each event. Errors as for `request`; RunError also means that the server failed later.
        """
        with self._open(path, body) as answer:
            for line in answer:
                kind, _, text = line.partition(b": ")
                if kind in (b"data", b"error"):
                    event = parse_json(text)
                    if not isinstance(event, dict):
                        raise ValueError(f"it sends {text[:100]!r}")
                    if kind == b"error" or "error" in event:
                        raise RunError(f"the {self.name} failed: {_find_message(event, text.decode(errors='replace'))}")
                    yield event

    @contextmanager
    def _open(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """Send a request, and yield the answer to read; what goes wrong meanwhile is translated."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = json.dumps(body, allow_nan=False).encode() if body else None
        handlers: list[urllib.request.BaseHandler] = [_RefuseRedirects()]
        if urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1"):  # a proxy for the outside must not get it
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            kind = ModelError if error.code < 400 or error.code in (401, 403, 404) else RunError
            raise kind(f"the {self.name} at {self.url} refused {path}: {error.code}, {_read_error(error)}") from error
        except TimeoutError as error:
            raise ModelError(f"the {self.name} at {self.url} did not answer {path} in {self.timeout:g} s") from error
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: the URL is not valid
            reason = getattr(error, "reason", error)
            raise ModelError(f"no {self.name} answers at {self.url}: {reason}", hint=self.hint) from error


def _read_error(error: urllib.error.HTTPError) -> str:
    """Return a server's own message, which is inside the JSON of its answer."""
    text = escape_control_characters(error.read(1 << 16).decode(errors="replace"))
    try:
        return _find_message(parse_json(text), text)
    except ValueError:
        return text[:300]


def _find_message(answer: Any, text: str) -> str:
    """Return the message in a server's error, or the beginning of its text."""
    try:
        return str(answer["error"]["message"] if "error" in answer else answer.get("detail", text))[:600]
    except (TypeError, KeyError, AttributeError):
        return text[:300]
