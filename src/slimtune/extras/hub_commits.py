"""Upload files to the Hugging Face Hub in one commit, without the token getting anywhere but into the requests.

Exceptions of the Hub client contain the request with its Authorization header. They are translated into errors without
a cause or context, so that neither a traceback nor an error reporter finds the header.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import RunError, SlimtuneError, UsageError, exception_chain

log = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Seconds until the Hub must answer. The client itself waits forever."""
MAX_SEARCHED_BYTES = 16 << 20
"""Largest file that is searched for the token."""
LOG_IN = "`hf auth login`, or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
REPO_ID_FORM = "NAME/REPOSITORY, of letters, digits, '-', '_' and '.', such as `ada/devils-dictionary`"


@dataclass(frozen=True)
class HubCommitResult:
    """What the repository contains after `commit_files`."""

    repo_id: str  # with its owner
    url: str
    private: bool
    created: bool  # the repository is new
    committed: bool  # there is a new commit; False: every file was there already
    info: CommitInfo  # the client's result: `oid`, `commit_url`, `pr_url`
    not_uploaded_files: list[str]  # given files that were not uploaded, because the repository had them
    existing_files: set[str]  # files that the repository had before


def require_repo_id(repo_id: str, *, require_owner: bool = False) -> None:
    """Raise UsageError unless `repo_id` is `owner/name`, or `name` where the owner is not required."""
    text = str(repo_id)
    if "://" in text:
        raise UsageError(f"{text!r} is a web address", REPO_ID_FORM, "give only the part behind huggingface.co/")
    if require_owner and "/" not in text:
        raise UsageError(f"{text!r} names no owner", REPO_ID_FORM)
    try:
        validate_repo_id(text)
    except HFValidationError as e:
        reason = str(e).partition(":")[0].rstrip(".")
        raise UsageError(f"{text!r} is not a repository id: {reason}", REPO_ID_FORM) from None


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    keep_if_existing: Sequence[str] = (),
    token: str | bool | None = None,
) -> HubCommitResult:
    """Upload files to a model repository in one commit; the repository is created if it does not exist.

    Args:
        files: contents by their names in the repository.
        repo_id: `owner/name`, or `name` for a repository of the token's owner.
        message, description: first line of the commit, and the others.
        private: True: only the owner sees the repository; None: the owner's default, or as it is.
        revision: branch, created if it does not exist; None: main.
        create_pr: open a pull request instead of writing to the branch.
        keep_if_existing: names in `files` that are not uploaded if the repository has them.
        token: None or True: the one of `hf auth login` or HF_TOKEN.

    Raises:
        UsageError: a malformed id, no token, one that is invalid or may not write, a public repository where a private
            one is requested, or a file that contains the token.
        RunError: the Hub cannot be reached, does not answer, or refuses.
    """
    require_repo_id(repo_id)
    if not message.strip():
        raise UsageError("the commit message is empty", "a line of text", "omit the option for the default")
    secret = _require_token(token, files)
    api = HfApi(token=secret, library_name="slimtune")
    created = False
    try:
        with _session_timeout(), warnings.catch_warnings(record=True) as caught:
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            try:
                repo = api.model_info(repo_id, timeout=TIMEOUT)
            except RepositoryNotFoundError:
                repo_id, created = api.create_repo(repo_id, private=private, exist_ok=True).repo_id, True
                repo = api.model_info(repo_id, timeout=TIMEOUT)
            if private and not repo.private:
                hint = f"make it private at {api.endpoint}/{repo_id}/settings, or give another name"
                raise UsageError(f"{repo_id} exists already and is public", "a private repository", hint)
            if revision is not None:
                if not create_pr and not revision.startswith("refs/pr/"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                repo = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
            existing = {s.rfilename for s in repo.siblings or []}
            kept = [name for name in keep_if_existing if name in files and name in existing]
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(name, content) for name, content in files.items() if name not in kept],
                commit_message=message,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
            )
        for warning in caught:
            if issubclass(warning.category, UserWarning):  # the Hub's warnings about the model card
                log.warning("%s", _clean_text(secret, str(warning.message)))
        url, changed = f"{api.endpoint}/{repo_id}", commit.oid != repo.sha
        return HubCommitResult(repo_id, url, bool(repo.private), created, changed, commit, kept, existing)
    except SlimtuneError:
        raise
    except Exception as e:
        error = _translate_error(e, f"{api.endpoint}/{repo_id}", created, secret)
    # Raised outside the handler, so that the client's exception is not its context.
    raise error


@contextmanager
def _session_timeout() -> Iterator[None]:
    """Set the timeout of the client's shared HTTP session."""
    session: Any = get_session()
    before = session.timeout
    session.timeout = TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def require_no_tokens(files: Mapping[str, Path | bytes], token: str | bool | None = None) -> None:
    """Raise UsageError if a file contains the token that would be used, or any other token of the Hub."""
    secret = _find_token(token).encode()
    for name, content in files.items():
        if isinstance(content, Path):
            content = content.read_bytes() if content.stat().st_size <= MAX_SEARCHED_BYTES else b""
        if (secret and secret in content) or re.search(rb"\bhf_[A-Za-z0-9]{34}\b", content):
            message = f"{name} contains {'your token' if secret and secret in content else 'a token of the Hub'}"
            raise UsageError(message, "files without it", "remove it, and create a new token")


def _find_token(token: str | bool | None) -> str:
    return ((token if isinstance(token, str) else None if token is False else get_token()) or "").strip()


def _require_token(token: str | bool | None, files: Mapping[str, Path | bytes]) -> str:
    """Return the token, which no file may contain."""
    secret = _find_token(token)
    if not secret:
        raise UsageError("you are not logged in to the Hub", "a token with write access", LOG_IN, code="hub-token")
    if not re.fullmatch(r"[!-~]+", secret):
        # The HTTP client would raise this with the token in its message.
        raise UsageError(
            "the token contains spaces, line ends or other invalid characters", "one word", LOG_IN, code="hub-token"
        )
    require_no_tokens(files, secret)
    return secret


def _clean_text(secret: str, text: str) -> str:
    """Return one line of text without the token, of at most 300 characters."""
    text = " ".join(re.sub(r"(?i)(bearer )\S+", r"\1…", text.replace(secret, "…")).split())
    return text if len(text) < 300 else text[:299] + "…"


def _translate_error(error: BaseException, url: str, created: bool, secret: str) -> SlimtuneError:
    """Return an error for what the client raised, without the request and the token."""
    chain = list(exception_chain(error))
    classes = {c.__name__ for e in chain for c in type(e).__mro__}  # by name: the client uses httpx or httpx2
    note = "; the new repository was created and has none of the files" if created else ""
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return RunError("HF_HUB_OFFLINE is set", "access to the Hub", "unset HF_HUB_OFFLINE")
    for response in (e for e in chain if isinstance(e, HfHubHTTPError)):
        status, reason = response.response.status_code, _clean_text(secret, response.server_message or "")
        detail = f"{f': {reason}' if reason else ''}{note}"
        if status == 401:
            return UsageError(
                f"the Hub does not accept this token{detail}",
                "a valid token with write access",
                LOG_IN,
                code="hub-token",
            )
        if status == 403:
            hint = f"give a repository of yours or of your organization, or another token: {LOG_IN}"
            return UsageError(
                f"this token may not write to {url}{detail}", "a token with write access", hint, code="hub-token"
            )
        if status == 404:
            return UsageError(f"{url} has no such repository or branch{detail}", "an existing one")
        hint = "push again later" if status == 429 or status >= 500 else ""
        return RunError(f"the Hub answered with error {status} to the upload to {url}{detail}", "a commit", hint)
    if "TimeoutException" in classes:
        message = f"the Hub gave no answer for {TIMEOUT:g} s; {url} shows whether the commit was made"
        return RunError(
            message, "an answer", "push again: files that are there already are not committed twice", code="offline"
        )
    if "TransportError" in classes:
        message = f"the Hub cannot be reached for {url}: {type(chain[-1]).__name__}{note}"
        return RunError(
            message, "a connection", "check the network, HTTPS_PROXY and HF_ENDPOINT, then push again", code="offline"
        )
    reason = _clean_text(secret, f"{type(error).__name__}: {chain[-1]}")
    return RunError(f"the upload to {url} failed: {reason}{note}", "one commit", "push again")
