"""A pytest plugin for HF PEFT's tests: puts the `peft` under test on the path and writes one JSON line a test.

Environment: PEFT_SUITE_PATH, the folder whose `peft` is tested (the shim, or real PEFT); PEFT_SUITE_OUT, the file of
JSON lines; PEFT_SUITE_TESTS, the folder of PEFT's tests; PEFT_SUITE_SKIP, JSON lines whose tests are not run.
slimtune's errors and warnings say PEFT's sentences here, too (`peft_words.py`), which PEFT's tests look for. A test
that needs the Hub is skipped, and one that makes the config of a method that slimtune lacks is not run. With
`--collect-only` there is a line for each test that would run.
"""

import ast
import contextlib
import functools
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
from pathlib import Path

import accelerate.utils  # noqa: F401
import peft_words
import pytest
import transformers.utils.import_utils as transformers_utils

# Libraries ask once whether peft is there: a user who has only changed the import has none.
if not transformers_utils.is_peft_available():
    with contextlib.suppress(ImportError):
        import diffusers.utils.import_utils  # noqa: F401
    from slimtune.compat.peft_registration import is_peft_installed

    assert not is_peft_installed()
sys.path.insert(0, os.environ["PEFT_SUITE_PATH"])
OUT = Path(os.environ["PEFT_SUITE_OUT"])
NEEDS_HUB = re.compile(
    r"LocalEntryNotFound|OfflineModeIsEnabled|offline mode|couldn't connect to|Cannot reach|HF_HUB_OFFLINE"
    r"|cannot find the requested files in the local cache|not in the local cache|outgoing traffic has been disabled"
    r"|Can't load the (configuration|model|tokenizer)|NameResolution|ConnectError|is not cached locally"
    r"|Couldn't find any data file|Couldn't reach|gated repo",
    re.IGNORECASE,
)


class AlwaysCached(dict):
    """Stands in for the tests' table of Hub models that are in the cache: all are."""

    def __contains__(self, key):
        return True

    def __missing__(self, key):
        return 0


def write_row(**row):
    with OUT.open("a") as f:
        f.write(json.dumps(row) + "\n")


def pytest_configure(config):
    OUT.write_text("")
    if Path(os.environ["PEFT_SUITE_PATH"]).name == "shim":
        peft_words.install()
    for mark in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config, items):
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = AlwaysCached()
    skip = os.environ.get("PEFT_SUITE_SKIP")
    skipped = {json.loads(line)["id"] for line in Path(skip).read_text().splitlines()} if skip else ()
    kept = []
    for item in items:
        if item.nodeid in skipped:
            continue
        missing = find_placeholder(getattr(getattr(item, "callspec", None), "params", {})) or find_config(item)
        if missing:
            write_row(id=item.nodeid, outcome="no method", text=missing)
        else:
            kept.append(item)
            if config.option.collectonly:
                write_row(id=item.nodeid, outcome="collected")
    items[:] = kept


def find_placeholder(value, depth=0):
    """Return the path of the first placeholder among a test's parameters."""
    if type(value).__name__ == "Placeholder":
        return value.path
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((f for f in (find_placeholder(v, depth + 1) for v in inner) if f), None) if depth < 4 else None


def find_config(item):
    """Return the path of a placeholder for a method's config that the test, or a method of its class, makes."""
    called = find_called_names(item.function)
    helpers = [getattr(item.cls, name, None) for name in called if item.cls is not None]
    called |= set().union(*(find_called_names(f) for f in helpers if inspect.isfunction(f)))
    found = (getattr(item.module, name, None) for name in sorted(called) if name.endswith("Config"))
    return next((value.path for value in found if type(value).__name__ == "Placeholder"), None)


@functools.cache
def find_called_names(function):
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    calls = (n.func for statement in definition.body for n in ast.walk(statement) if isinstance(n, ast.Call))
    return {getattr(f, "id", getattr(f, "attr", "")) for f in calls}


def pytest_collectreport(report):
    if report.failed:
        write_row(id=report.nodeid, outcome="not collected", text=str(report.longrepr)[-1500:])


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and call.excinfo is not None:
        chain, e = [], call.excinfo.value
        while e is not None and e not in chain:
            chain.append(e)
            e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
        text = " | ".join(f"{type(e).__name__}: {e}" for e in chain)
        if NEEDS_HUB.search(text) and "SlimtuneLacks" not in text:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: needs the Hub")
            write_row(id=item.nodeid, outcome="hub", text=text[:300])
            return
        frames = traceback.extract_tb(call.excinfo.tb)
        where = {}
        for part in ("/tests/", "/slimtune/", ""):
            last = next((f for f in reversed(frames) if part in f.filename), None)
            where[part.strip("/") or "end"] = f"{Path(last.filename).name}:{last.lineno} {last.line}" if last else ""
        outcome = "failed" if report.when == "call" else "error"
        write_row(id=item.nodeid, outcome=outcome, text=text[:1500], **where)
    elif report.when == "call" and report.passed:
        write_row(id=item.nodeid, outcome="passed")
    elif report.skipped:
        write_row(id=item.nodeid, outcome="skipped", text=str(report.longrepr)[-300:])
