"""One commit on the Hub: all files or none, and the token nowhere but in the request.

    repository there? ─ made if not ─ branch ─ large files to the Hub's store ─ one commit that names them all

What the client raises holds the request with its Authorization header. It is told in words of ours, without a cause.
"""

from __future__ import annotations

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

from ..errors import RunError, SlimtuneError, UsageError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""How long the Hub may be silent. The client's own default is for ever."""
_SEARCHED = 16 << 20
"""Bytes up to which a file is searched for the token before it leaves."""
_LOG_IN = "`hf auth login`, or set HF_TOKEN (tokens: https://huggingface.co/settings/tokens)"
_FORM = "NAME/REPOSITORY, of letters, digits, '-', '_' and '.', such as `ada/devils-dictionary`"


@dataclass(frozen=True)
class Committed:
    """What lies on the Hub now.

    Args:
        repo_id: of the repository, with its owner.
        url: its address.
        private: whether others cannot see it.
        made: whether it was made for this.
        changed: whether there is a new commit; False: every file was there already.
        info: the client's own: `oid`, `commit_url`, `pr_url`.
        kept: files given that were there already and were to be left.
        replaced: files that were there already, and hold now what was given.
        beside: files that lay there before, and still do.
    """

    repo_id: str
    url: str
    private: bool
    made: bool
    changed: bool
    info: CommitInfo
    kept: list[str]
    replaced: list[str]
    beside: list[str]


def require_repo_id(repo_id: str, *, owner: bool = False) -> None:
    """Check the form of a repository's id.

    Args:
        repo_id: `owner/name`, or `name` for one of the token's owner.
        owner: whether the owner has to be named.

    Raises:
        UsageError: it has another; the right one is said.
    """
    text = str(repo_id)
    if "://" in text:
        raise UsageError(f"{text!r} is a web address", _FORM, "give the part behind huggingface.co/ alone")
    if owner and "/" not in text:
        raise UsageError(f"{text!r} names no owner", _FORM)
    try:
        validate_repo_id(text)
    except HFValidationError as e:
        raise UsageError(f"{text!r} is no repository's id: {str(e).partition(':')[0].rstrip('.')}", _FORM) from None


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    keep: Sequence[str] = (),
    token: str | bool | None = None,
    endpoint: str | None = None,
    seconds: float = ANSWER_SECONDS,
) -> Committed:
    """Put files into a model repository, in one commit; the repository is made if it is not there.

    Args:
        files: what to upload, by the names it gets there.
        repo_id: `owner/name`, or `name` for one of the token's owner.
        message: the commit's first line.
        description: more about it.
        private: True: only its owner sees it; None: as the owner's default is, or as it is already.
        revision: the branch to commit to, made if it is not there; None: main.
        create_pr: open a pull request in place of writing to the branch.
        keep: names in `files` that are left as they are where the repository has them.
        token: of the account; None or True: the one `hf auth login` or HF_TOKEN gives.
        endpoint: of the Hub; None: HF_ENDPOINT, else huggingface.co.
        seconds: how long an answer may take.

    Raises:
        UsageError: the id's form, no token, one the Hub does not know or that may not write there, a public
            repository where a private one was asked for, or a file that holds the token.
        RunError: the Hub cannot be reached, is silent, or refuses.
    """
    require_repo_id(repo_id)
    if not message.strip():
        raise UsageError("the commit has no message", "a line of text", "leave the option out for the default")
    secret = _secret(token)
    _hold_no(secret, files)
    job = _Job(HfApi(endpoint=endpoint, token=secret, library_name="slimtune"), repo_id, seconds)
    try:
        with _answers_within(seconds), warnings.catch_warnings(record=True) as said:
            done = job.run(files, message, description, private, revision, create_pr, keep)
        for warning in said:
            if issubclass(warning.category, UserWarning):  # the Hub's, of the card; others are the client's own affair
                log.warning("%s", _without(secret, str(warning.message)))
        return done
    except SlimtuneError:
        raise
    except Exception as e:
        fault = _fault(e, job, secret)
    # Out here `e` is no context of it: neither a traceback nor an error reporter meets the request.
    raise fault


class _Job:
    """One upload, and how far it came."""

    def __init__(self, api: HfApi, repo_id: str, seconds: float) -> None:
        self.api, self.repo_id, self.seconds = api, repo_id, seconds
        self.made = self.sent = False

    def run(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        description: str | None,
        private: bool | None,
        revision: str | None,
        create_pr: bool,
        keep: Sequence[str],
    ) -> Committed:
        api = self.api
        if "/" not in self.repo_id:
            self.repo_id = f"{api.whoami()['name']}/{self.repo_id}"
        info = self._there(private)
        if private and not info.private:
            raise UsageError(
                f"{self.repo_id} is there already, and public",
                "a private repository",
                f"make it private at {api.endpoint}/{self.repo_id}/settings, or give another name",
            )
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(self.repo_id, branch=revision, exist_ok=True)
        if revision is not None:
            info = api.model_info(self.repo_id, revision=revision, timeout=self.seconds)
        there = {s.rfilename for s in info.siblings or []}
        kept = [n for n in keep if n in files and n in there]
        adds = [CommitOperationAdd(n, f) for n, f in files.items() if n not in kept]
        self.sent = True
        commit = api.create_commit(
            self.repo_id, adds, commit_message=message, commit_description=description, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip
        given = {a.path_in_repo for a in adds}
        return Committed(
            repo_id=self.repo_id,
            url=f"{api.endpoint}/{self.repo_id}",
            private=bool(info.private),
            made=self.made,
            changed=commit.oid != info.sha,
            info=commit,
            kept=kept,
            replaced=sorted(there & given),
            beside=sorted(there - given - {".gitattributes"}),
        )

    def _there(self, private: bool | None) -> Any:
        try:
            # It does not heed the session's timeout, but its own, which is for ever, too.
            return self.api.model_info(self.repo_id, timeout=self.seconds)
        except RepositoryNotFoundError:
            pass
        self.repo_id = self.api.create_repo(self.repo_id, private=private, exist_ok=True).repo_id
        self.made = True
        return self.api.model_info(self.repo_id, timeout=self.seconds)


@contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    session: Any = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def _secret(token: str | bool | None) -> str:
    found = token if isinstance(token, str) else None if token is False else get_token()
    found = (found or "").strip()
    if not found:
        raise UsageError("you are not logged in to the Hub", "a token that may write", _LOG_IN)
    if not re.fullmatch(r"[!-~]+", found):
        # The client would say so with the token in its message.
        raise UsageError("the token holds characters that no token has (spaces, line ends)", "one word", _LOG_IN)
    return found


def _hold_no(secret: str, files: Mapping[str, Path | bytes]) -> None:
    for name, file in files.items():
        if isinstance(file, Path):
            if file.stat().st_size > _SEARCHED:
                continue
            file = file.read_bytes()
        if secret.encode() in file:
            raise UsageError(f"{name} holds your token", "files without it", "take it out, and make a new token")


def _without(secret: str, text: str) -> str:
    """Return text without the token, cut to what a terminal shows."""
    text = re.sub(r"(?i)(bearer )\S+", r"\1…", text.replace(secret, "…"))
    text = " ".join(text.split())
    return text if len(text) < 300 else text[:299] + "…"


def _fault(e: BaseException, job: _Job, secret: str) -> SlimtuneError:
    """Return what the client raised, in words of ours."""
    where, left = f"{job.api.endpoint}/{job.repo_id}", ""
    if job.made:
        left = f"; the repository {job.repo_id} was made and has none of the files"
    steps = _chain(e)
    kinds = {c.__name__ for step in steps for c in type(step).__mro__}
    answered = next((s for s in steps if isinstance(s, HfHubHTTPError)), None)
    if any(isinstance(s, OfflineModeIsEnabled) for s in steps):
        return RunError("the Hub is switched off (HF_HUB_OFFLINE)", "access to the Hub", "unset HF_HUB_OFFLINE")
    if answered is not None:
        said = _without(secret, answered.server_message or "")
        return _refusal(answered.response.status_code, said, job, left)
    # By name: the client's HTTP library is httpx or httpx2, depending on its version.
    if "TimeoutException" in kinds:
        unknown = f"; whether the commit was made, {where} shows" if job.sent else left
        return RunError(
            f"the Hub ({job.api.endpoint}) gave no answer for {job.seconds:g} s{unknown}",
            "an answer",
            "push again: what is there already is not committed twice",
        )
    if "TransportError" in kinds:
        return RunError(
            f"the Hub ({job.api.endpoint}) cannot be reached: {type(steps[-1]).__name__}{left}",
            "a connection",
            "check the network, HTTPS_PROXY and HF_ENDPOINT, then push again",
        )
    told = _without(secret, f"{type(e).__name__}: {steps[-1]}")
    return RunError(f"the upload to {where} failed: {told}{left}", "one commit", "push again")


def _refusal(status: int, said: str, job: _Job, left: str) -> SlimtuneError:
    because = f": {said}" if said else ""
    if status == 401:
        return UsageError(f"the Hub does not know this token{because}{left}", "a valid token that may write", _LOG_IN)
    if status == 403:
        return UsageError(
            f"this token may not write to {job.repo_id}{because}{left}",
            "a repository of yours or of an organization you may write for, and a token that may write",
            f"give another REPO_ID, or another token: {_LOG_IN}",
        )
    if status == 404:
        return UsageError(f"the Hub has no such repository or branch in {job.repo_id}{because}{left}", "one that is")
    if status == 429:
        return RunError(f"the Hub takes no more requests for now{because}{left}", hint="wait, then push again")
    if status >= 500:
        return RunError(f"the Hub answered with error {status}{because}{left}", "a commit", "push again later")
    return RunError(f"the Hub refused, error {status}{because}{left}", "a commit")


def _chain(e: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    step: BaseException | None = e
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__ or step.__context__
    return found
