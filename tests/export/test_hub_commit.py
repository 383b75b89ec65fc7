"""One commit through the real client: all files or none, and the token nowhere."""

import io
import logging
import traceback

import huggingface_hub
import pytest
from hub_server import TOKEN, serve_hub
from huggingface_hub import constants

from slimtune.errors import RunError, SlimtuneError, UsageError
from slimtune.utils.hub import commit_files

FILES = {"README.md": b"---\ntags:\n- a\n---\n# A\n", "a.json": b"{}", "b.safetensors": b"\0" * 999}


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(monkeypatch) as hub:
        yield hub


def push(hub, repo_id="ada/words", files=FILES, **options):
    return commit_files(files, repo_id, **{"message": "m", "token": TOKEN, **options})


def assert_no_token(error: BaseException) -> None:
    assert TOKEN not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


def test_one_commit_creates_and_fills_a_repository(hub):
    done = push(hub)
    repo = hub.repos["ada/words"]
    assert repo.files() == {".gitattributes": b"", **FILES}
    assert [message for message, _ in repo.branches["main"]] == ["initial commit", "m"]
    assert (done.repo_id, done.url, done.private) == ("ada/words", f"{hub.url}/ada/words", False)
    assert done.created
    assert done.committed
    assert done.info.oid == repo.sha()


def test_unchanged_files_are_not_committed_again(hub):
    push(hub)
    again = push(hub)
    assert not again.committed
    assert not again.created
    assert len(hub.repos["ada/words"].branches["main"]) == 2
    assert push(hub, files={**FILES, "a.json": b"[]"}).committed
    assert hub.repos["ada/words"].files()["a.json"] == b"[]"


def test_a_name_without_owner_is_ones_own(hub):
    assert push(hub, "words").repo_id == "ada/words"


def test_private_repositories(hub):
    assert push(hub, private=True).private
    assert push(hub).private, "it stays private"
    hub.make("ada/public")
    with pytest.raises(UsageError, match="exists already and is public"):
        push(hub, "ada/public", private=True)
    assert len(hub.repos["ada/public"].branches["main"]) == 1


def test_a_branch_is_created(hub):
    push(hub, revision="v1")
    assert "a.json" in hub.repos["ada/words"].files("v1")
    assert "a.json" not in hub.repos["ada/words"].files()
    assert not push(hub, revision="v1").committed


def test_kept_files_are_not_replaced(hub):
    hub.make("ada/words", **{"README.md": b"by hand", "model.safetensors": b"x"})
    done = push(hub, keep=("README.md",))
    assert hub.repos["ada/words"].files()["README.md"] == b"by hand"
    assert done.kept == ["README.md"]
    assert "model.safetensors" in done.existing


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "datasets/a/b", "a b/c", "/b", "a/b--c", "x.git", "a/b\n", "a" * 97])
def test_a_malformed_id_shows_the_form(hub, repo_id):
    with pytest.raises(UsageError, match="NAME/REPOSITORY"):
        push(hub, repo_id)
    assert hub.requests == []


def test_a_web_address_is_not_an_id(hub):
    with pytest.raises(UsageError, match="only the part behind"):
        push(hub, "https://huggingface.co/ada/words")


def test_an_empty_message_is_refused(hub):
    with pytest.raises(UsageError, match="message is empty"):
        push(hub, message=" ")


@pytest.mark.parametrize("token", [None, False, "", "  \n"])
def test_without_a_token(hub, token):
    with pytest.raises(UsageError, match="hf auth login"):
        push(hub, token=token)
    assert hub.requests == []


def test_the_token_of_the_environment(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(hub, token=None).created


@pytest.mark.parametrize("token", [f"{TOKEN}\nX: y", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_malformed_token_is_not_shown(hub, token):
    with pytest.raises(UsageError, match="invalid characters") as e:
        push(hub, token=token)
    assert_no_token(e.value)


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("ada/words", {"token": "hf_wrong"}, "does not accept this token"),
        ("bob/words", {}, "may not write to"),
        ("bob/private", {}, "may not write to"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_repositories_one_may_not_write_to(hub, repo_id, options, message, exists):
    if exists:
        hub.make(repo_id, private=repo_id == "bob/private")
    with pytest.raises(UsageError, match=message) as e:
        push(hub, repo_id, **options)
    assert_no_token(e.value)
    assert "hf auth login" in e.value.hint
    assert not exists or list(hub.repos[repo_id].files()) == [".gitattributes"]


@pytest.mark.parametrize(
    ("request_", "failure", "message"),
    [
        ("GET /api/models/ada/words", "drop", "cannot be reached"),
        ("GET /api/models/ada/words", "hang", "no answer for 0.4 s"),
        ("POST /api/repos/create", 429, "error 429"),
        ("POST /api/repos/create", "echo", "error 500"),
        ("POST /api/validate-yaml", 500, "none of the files"),
        ("POST .*/preupload/main", 400, "none of the files"),
        ("POST .*/commit/main", 413, "none of the files"),
        ("POST .*/commit/main", "echo", "error 500"),
        ("POST .*/commit/main", "drop", "cannot be reached"),
        ("POST .*/commit/main", "hang", "shows whether the commit was made"),
    ],
)
def test_a_failing_hub_leaves_nothing_half_done(hub, request_, failure, message):
    hub.fail[request_] = failure
    with pytest.raises(SlimtuneError, match=message) as e:
        push(hub, timeout=0.4)
    assert_no_token(e.value)
    assert len(e.value.message) < 600
    assert "ada/words" not in hub.repos or list(hub.repos["ada/words"].files()) == [".gitattributes"]


def test_errors_of_the_client_itself(hub, monkeypatch):
    def fail(*_, **__):
        raise LookupError(f"Authorization: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    with pytest.raises(RunError, match=r"LookupError: Authorization: Bearer …") as e:
        push(hub)
    assert_no_token(e.value)


def test_without_a_network(hub, monkeypatch):
    with pytest.raises(RunError, match="cannot be reached") as e:
        push(hub, endpoint="http://127.0.0.1:9")
    assert_no_token(e.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        push(hub)


def test_the_token_is_in_no_log(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        push(hub)
        hub.fail["POST .*/commit/main"] = "echo"
        with pytest.raises(RunError):
            push(hub, files={"a.json": b"1"})
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert "commit/main" in logged.getvalue()
    assert TOKEN not in logged.getvalue()


@pytest.mark.parametrize("as_path", [True, False])
def test_a_file_that_contains_the_token_is_refused(hub, tmp_path, as_path):
    content = f"token: {TOKEN}".encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json contains your token") as e:
        push(hub, files={"config.json": tmp_path / "config.json" if as_path else content})
    assert_no_token(e.value)
    assert hub.requests == []


def test_the_session_of_the_client_is_restored(hub):
    before = huggingface_hub.get_session().timeout
    push(hub)
    assert huggingface_hub.get_session().timeout == before
