"""Turn what transformers, the Hub and safetensors raise while a base is loaded into one short error."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from huggingface_hub import errors as hub
from transformers.utils import logging as transformers_logging

from ...errors import ModelError, RunError, SlimtuneError, UsageError, exception_chain, is_disk_full, is_out_of_memory

_REMOTE_CODE = "the base {spec!r} brings code of its own, which would run on this machine"
_TRUST = "read that code, then pass --trust-remote-code if you trust it"
_OFFLINE = "the base {spec!r} is not on this disk (nor in the Hub's cache), and the Hub cannot be reached"
_DAMAGED = "the {what} {spec!r} cannot be loaded: {kind}: {detail}"
_TRANSLATIONS: tuple[tuple[tuple[type[Exception] | str, ...], type[SlimtuneError], str, str], ...] = (
    # Types of exceptions or parts of their texts; the error to raise instead, its message and hint. The first match
    # counts: a GatedRepoError is a RepositoryNotFoundError, too.
    (("custom code", "trust_remote_code"), UsageError, _REMOTE_CODE, _TRUST),
    ((hub.GatedRepoError,), ModelError, "the base {spec!r} is gated on the Hub, and this account may not read it",
     "accept its terms at https://huggingface.co/{spec}, then `hf auth login`"),
    ((hub.RepositoryNotFoundError,), ModelError, "the Hub has no model {spec!r}, or it is private",
     "check the name; for a private one `hf auth login`; or give a local folder"),
    ((hub.RevisionNotFoundError,), UsageError, "the model {spec!r} has no such revision on the Hub",
     "give a branch, a tag or a commit id"),
    ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, "We couldn't connect"), ModelError, _OFFLINE,
     "check the network and HF_HUB_OFFLINE, or give a local folder"),
    ((hub.EntryNotFoundError, "does not appear to have a file named"), ModelError,
     "the model {spec!r} on the Hub lacks a file: {detail}", "it needs config.json and weights in *.safetensors"),
    (("Unrecognized configuration class",), ModelError, "{spec!r} is no model for this task: {detail}",
     "choose the task that the base was made for"),
    (("does not recognize this architecture", "is not supported yet"), ModelError,
     "the installed transformers does not know the architecture of {spec!r}: {detail}", "pip install -U transformers"),
    ((ImportError,), ModelError, "{spec!r} needs a package that is missing: {detail}", "pip install {package}"),
    (("ignore_mismatched_sizes",), ModelError, "the weights of {spec!r} have other shapes than its config.json says",
     "take config.json and weights from the same checkpoint"),
    (("attn_implementation",), ModelError, "{spec!r} has no such attention: {detail}",
     'use attn_implementation="eager" for this base'),
    ((Exception,), ModelError, _DAMAGED, "give a whole and undamaged {thing}: download or save it again"),
)  # fmt: skip


@contextlib.contextmanager
def silencing_model_loading() -> Iterator[None]:
    """Load without progress bars, without text on stdout, and without asking the Hub to convert pickled weights."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    variable = "DISABLE_SAFETENSORS_CONVERSION"
    convert = os.environ.get(variable)
    transformers_logging.set_verbosity(max(verbosity, logging.ERROR))
    transformers_logging.disable_progress_bar()
    os.environ[variable] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if convert is None:
            del os.environ[variable]
        else:
            os.environ[variable] = convert


@contextlib.contextmanager
def silence_and_translate_load_errors(spec: str, label: str = "base") -> Iterator[None]:
    """Silence the libraries, and raise a UsageError, ModelError or RunError in place of their exceptions.

    Args:
        spec: name of the base.
        label: what is loaded from it.
    """
    try:
        with silencing_model_loading():
            yield
    except SlimtuneError:
        raise
    except Exception as error:
        raise _translate(error, spec, label) from error


def make_remote_code_error(spec: str) -> UsageError:
    """Return the error for a base with Python code of its own."""
    return UsageError(_REMOTE_CODE.format(spec=spec), hint=_TRUST, code="remote-code")


def _translate(error: Exception, spec: str, what: str) -> SlimtuneError:
    if is_disk_full(error):
        return RunError(
            f"the disk is full: {spec!r} could not be written", hint="free some space, or set HF_HOME", code="disk-full"
        )
    if is_out_of_memory(error):
        hint = "use --dtype bf16, a smaller base, or a larger machine"
        return RunError(f"no memory left while loading {spec!r}", hint=hint, code="cuda-out-of-memory")
    kind, chain = type(error).__name__, list(exception_chain(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [kind]
    detail = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    detail = detail if len(detail) < 300 else detail[:299] + "…"
    package = next((e.name for e in chain if isinstance(e, ImportError) and e.name), "it")
    values = {
        "spec": spec,
        "what": what,
        "thing": what.removesuffix(" of"),
        "kind": kind,
        "detail": detail,
        "package": package,
    }
    for signs, cls, message, hint in _TRANSLATIONS:
        types, parts = tuple(s for s in signs if isinstance(s, type)), [s for s in signs if isinstance(s, str)]
        if any(isinstance(e, types) or any(part in str(e) for part in parts) for e in chain):
            return cls(message.format(**values), hint=hint.format(**values))
    raise AssertionError  # the last entry matches every exception
