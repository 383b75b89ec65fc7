"""What transformers and the Hub say when a base cannot be loaded, in one message that names the fix."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging as theirs

from ..errors import (
    ModelError,
    RunError,
    SlimtuneError,
    UsageError,
    exception_chain,
    is_disk_full,
    is_out_of_memory,
)

_FOLDER = "give a local folder that holds the checkpoint"


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Load without progress bars or remarks on stdout, and without asking a bot to convert a pickled repository."""
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    convert = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    theirs.set_verbosity(max(verbosity, logging.ERROR))
    theirs.disable_progress_bar()
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
        if convert is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = convert


@contextlib.contextmanager
def translate_load_errors(spec: str, what: str = "base") -> Iterator[None]:
    """Turn what transformers, huggingface_hub and safetensors raise into one of our errors, quietly.

    Raises:
        UsageError: the base wants remote code, or the revision does not exist.
        ModelError: it cannot be found, reached or read.
        RunError: the disk or the memory is full.
    """
    try:
        with silence_libraries():
            yield
    except SlimtuneError:
        raise
    except Exception as error:
        raise (_space(error, spec) or _code(error, spec) or _hub(error, spec) or _other(error, spec, what)) from error


def remote_code_error(spec: str) -> UsageError:
    """Return the error for a base that brings Python code of its own."""
    return UsageError(
        f"the base {spec!r} brings code of its own, which would run on this machine",
        "a base of an architecture that transformers knows",
        "read that code, then pass --trust-remote-code if you trust it",
    )


def _space(error: Exception, spec: str) -> SlimtuneError | None:
    if is_disk_full(error):
        return RunError(f"the disk is full: {spec!r} could not be written", hint="free some space, or set HF_HOME")
    if is_out_of_memory(error):
        return RunError(
            f"no memory left while loading {spec!r}", hint="use --dtype bf16, a smaller base, or a larger machine"
        )
    return None


def _code(error: Exception, spec: str) -> SlimtuneError | None:
    texts = [str(e) for e in exception_chain(error)]
    return remote_code_error(spec) if any("custom code" in t or "trust_remote_code" in t for t in texts) else None


def _hub(error: Exception, spec: str) -> SlimtuneError | None:
    found = list(exception_chain(error))

    def there(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in found)

    if there(GatedRepoError):  # first: it is a RepositoryNotFoundError too
        return ModelError(
            f"the base {spec!r} is gated on the Hub, and this account may not read it",
            hint=f"accept its terms at https://huggingface.co/{spec}, then `hf auth login`",
        )
    if there(RepositoryNotFoundError):
        return ModelError(
            f"the Hub has no model {spec!r}, or it is private",
            hint=f"check the name; for a private one `hf auth login`; or {_FOLDER}",
        )
    if there(RevisionNotFoundError):
        return UsageError(f"the model {spec!r} has no such revision on the Hub", "a branch, a tag or a commit id")
    if there(LocalEntryNotFoundError, OfflineModeIsEnabled) or any("We couldn't connect" in str(e) for e in found):
        why = "the Hub is switched off (HF_HUB_OFFLINE)" if _offline() else "the Hub cannot be reached"
        return ModelError(
            f"the base {spec!r} is not on this disk (nor in the Hub's cache), and {why}",
            hint=f"check the network and HF_HUB_OFFLINE, or {_FOLDER}",
        )
    if there(EntryNotFoundError) or "does not appear to have a file named" in str(error):
        return ModelError(
            f"the model {spec!r} on the Hub lacks a file: {_line(error)}", "config.json and weights in *.safetensors"
        )
    return None


def _other(error: Exception, spec: str, what: str) -> SlimtuneError:
    text = str(error)
    if "Unrecognized configuration class" in text:
        return ModelError(
            f"{spec!r} is no model for this task: {_line(error)}", hint="choose the task that the base was made for"
        )
    if "does not recognize this architecture" in text or "is not supported yet" in text:
        return ModelError(
            f"the installed transformers does not know the architecture of {spec!r}: {_line(error)}",
            hint="pip install -U transformers",
        )
    if isinstance(error, ImportError):
        return ModelError(f"{spec!r} needs a package that is missing: {_line(error)}", hint="install that package")
    if "attn_implementation" in text:
        return ModelError(
            f"{spec!r} has no such attention: {_line(error)}", hint='use attn_implementation="eager" for this base'
        )
    return ModelError(
        f"the {what} {spec!r} cannot be loaded: {type(error).__name__}: {_line(error)}",
        f"a whole and undamaged {what}",
        "download or save it again",
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _line(error: Exception) -> str:
    """Return the first line of an error, cut to what a terminal shows."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) < 300 else text[:299] + "…"
