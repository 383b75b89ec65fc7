"""The transcripts of docs/serve.md, run against a server with runs of these names."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hand_run import make_run

from slimtune.serving.model_server import ModelServer, ServeSettings

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
BLOCKS = re.findall(r"<!-- transcript -->\n```(\w+)\n(.*?)```", PAGE, re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_llama, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("page")
    base = folder / "smollm2-135m"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    server = ModelServer([str(make_run(folder / name, base)) for name in ("sailor", "pirate")], ServeSettings(port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server.url.removesuffix("/v1")
    server.stop()
    thread.join(30)


def shape(value):
    """Return a JSON value with the kinds of its leaves in place of numbers and texts."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return type(value).__name__


def test_curl(address):
    (text,) = [text for language, text in BLOCKS if language == "console"]
    commands = re.findall(r"^\$ (curl (?:.|\n  )*)\n(\{.*\})$", text, re.MULTILINE)
    assert len(commands) == text.count("$ curl") == 3
    for command, printed in commands:
        done = subprocess.run(["bash", "-c", command.replace(ADDRESS, address)], capture_output=True, text=True)
        answer, shown = json.loads(done.stdout), json.loads(printed)
        assert shape(answer) == shape(shown), command
        if "error" in shown:
            assert answer == shown


def test_python(address):
    printed = []
    for code in [text for language, text in BLOCKS if language == "python"]:
        done = subprocess.run([sys.executable, "-c", code.replace(ADDRESS, address)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert len(re.findall(r" -\d+\.\d+ \[", printed[0])) == 5
    assert re.fullmatch(r"\{'name': .*, 'age': \d+\}\n\d{4}-\d{2}-\d{2}\n", printed[1])
