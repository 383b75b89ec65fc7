"""One commit through the real client: all files or none, and the token nowhere."""

import io
import logging
import traceback

import huggingface_hub
import pytest
from error_facts import has_code
from hub_server import TOKEN
from huggingface_hub import constants

from slimtune.errors import RunError, SlimtuneError, UsageError
from slimtune.extras import hub_commits as hub_module
from slimtune.extras.hub_commits import commit_files

FILES = {"README.md": b"---\ntags:\n- a\n---\n# A\n", "a.json": b"{}", "b.safetensors": b"\0" * 999}


def commit(repo_id="ada/words", files=FILES, **options):
    return commit_files(files, repo_id, **{"message": "m", "token": TOKEN, **options})


def assert_no_token(error: BaseException) -> None:
    assert TOKEN not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None
    assert error.__context__ is None


def test_new_repository(hub):
    done = commit()
    repo = hub.repos["ada/words"]
    assert repo.files() == {".gitattributes": b"", **FILES}
    assert [message for message, _ in repo.branches["main"]] == ["initial commit", "m"]
    assert (done.repo_id, done.url, done.private) == ("ada/words", f"{hub.url}/ada/words", False)
    assert (done.created, done.committed, done.info.oid) == (True, True, repo.sha())
    assert commit("other").repo_id == "ada/other", "a name without owner is one's own"


def test_unchanged_files_not_committed(hub):
    commit()
    again = commit()
    assert (again.created, again.committed) == (False, False)
    assert len(hub.repos["ada/words"].branches["main"]) == 2
    assert commit(files={**FILES, "a.json": b"[]"}).committed
    assert hub.repos["ada/words"].files()["a.json"] == b"[]"


def test_private_repository(hub):
    assert commit(private=True).private
    assert commit().private, "it stays private"
    hub.make("ada/public")
    with pytest.raises(UsageError, match="public"):
        commit("ada/public", private=True)
    assert len(hub.repos["ada/public"].branches["main"]) == 1


def test_new_branch(hub):
    commit(revision="v1")
    assert "a.json" in hub.repos["ada/words"].files("v1")
    assert "a.json" not in hub.repos["ada/words"].files()
    assert not commit(revision="v1").committed


def test_kept_files(hub):
    hub.make("ada/words", **{"README.md": b"by hand", "model.safetensors": b"x"})
    done = commit(keep_if_existing=("README.md",))
    assert hub.repos["ada/words"].files()["README.md"] == b"by hand"
    assert done.not_uploaded_files == ["README.md"]
    assert "model.safetensors" in done.existing_files


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "datasets/a/b", "a b/c", "/b", "a/b--c", "x.git", "a/b\n", "a" * 97])
def test_malformed_id(hub, repo_id):
    with pytest.raises(UsageError, match="NAME/REPOSITORY"):
        commit(repo_id)
    assert hub.requests == []


def test_web_address_and_empty_message(hub):
    with pytest.raises(UsageError, match=r"huggingface\.co/"):
        commit("https://huggingface.co/ada/words")
    with pytest.raises(UsageError, match="message"):
        commit(message=" ")


@pytest.mark.parametrize("token", [None, False, "", "  \n", f"{TOKEN}\nX: y", f"{TOKEN} x", f"{TOKEN}é"])
def test_missing_or_malformed_token(hub, token):
    with pytest.raises(UsageError, check=has_code("hub-token")) as e:
        commit(token=token)
    assert_no_token(e.value)
    assert hub.requests == []


def test_token_of_the_environment(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert commit(token=None).created


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        ("ada/words", {"token": "hf_wrong"}, "does not accept this token"),
        ("bob/words", {}, "may not write to"),
        ("bob/private", {}, "may not write to"),
    ],
)
def test_no_right_to_write(hub, repo_id, options, message, exists):
    if exists:
        hub.make(repo_id, private=repo_id == "bob/private")
    with pytest.raises(UsageError, match=message) as e:
        commit(repo_id, **options)
    assert_no_token(e.value)
    assert e.value.code == "hub-token"
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
def test_failing_hub(hub, monkeypatch, request_, failure, message):
    hub.fail[request_] = failure
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.4)
    with pytest.raises(SlimtuneError, match=message) as e:
        commit()
    assert_no_token(e.value)
    assert len(e.value.message) < 600
    assert "ada/words" not in hub.repos or list(hub.repos["ada/words"].files()) == [".gitattributes"]


def test_error_of_the_client(hub, monkeypatch):
    def fail(*_, **__):
        raise LookupError(f"Authorization: Bearer {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    with pytest.raises(RunError, match=r"LookupError: Authorization: Bearer …") as e:
        commit()
    assert_no_token(e.value)


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, check=has_code("offline")) as e:
        commit()
    assert_no_token(e.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        commit()


def test_token_is_in_no_log(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    for logger in (logging.getLogger(), logging.getLogger("huggingface_hub")):
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        logging.getLogger().manager._clear_cache()  # the levels that loggers remember
    commit()
    hub.fail["POST .*/commit/main"] = "echo"
    with pytest.raises(RunError):
        commit(files={"a.json": b"1"})
    assert "commit/main" in logged.getvalue()
    assert TOKEN not in logged.getvalue()


@pytest.mark.parametrize("as_path", [True, False])
def test_file_that_contains_the_token(hub, tmp_path, as_path):
    content = f"token: {TOKEN}".encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json") as e:
        commit(files={"config.json": tmp_path / "config.json" if as_path else content})
    assert_no_token(e.value)
    assert hub.requests == []


def test_session_of_the_client_restored(hub):
    before = huggingface_hub.get_session().timeout
    commit()
    assert huggingface_hub.get_session().timeout == before
