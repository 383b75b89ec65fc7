"""OpenAI's client, and bare HTTP, for a server of a test."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import openai

from slimtune.serving.model_server import ModelServer


def make_client(server: ModelServer, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, **{"api_key": "none", "max_retries": 0, **settings})


def connect(server: ModelServer) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port, timeout=30)


def send(server: ModelServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Send a request without OpenAI's client; return the status and the JSON of the answer."""
    connection = connect(server)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())
