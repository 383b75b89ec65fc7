import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slimtune.errors import ModelError, RunError, SlimtuneError
from slimtune.models import gguf as room
from slimtune.models.gguf import cache_root, llama3_divisors, read_dequantized
from slimtune.models.loader import load_base, load_tokenizer
from slimtune.models.registry import load_config, resolve_model
from slimtune.utils.fingerprint import config_fingerprint

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    # As many rows as the vocabulary has tokens, the two merges included; untied unless a test says otherwise.
    return tiny_llama(vocab_size=261, head_dim=8, tie_word_embeddings=True)


@pytest.fixture
def tokenizer(tiny_tokenizer: Callable[..., Any]) -> Any:
    made = tiny_tokenizer()
    made.add_tokens(["Ġa", "Ġ1"])
    return made


@pytest.fixture
def file(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model, tokenizer)


def refused(file: Path, kind: type[SlimtuneError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        read_dequantized(file)
    assert caught.value.exit_code == 1
    for word in words:
        assert word in str(caught.value)


def left(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.glob("*") if not p.name.endswith(".lock"))


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", "/a")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("SLIMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/b/slimtune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "slimtune"


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_becomes_the_same_model(
    tmp_path: Path, tiny_llama: Callable[..., Any], tokenizer: Any, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(vocab_size=261, head_dim=8, tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    base = load_base(str(file), dtype="fp32", device="cpu")
    assert capsys.readouterr().out == ""
    assert base.prepare_seconds > 0
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied
    assert base.fingerprint == config_fingerprint(model.config)
    config, generation = base.model.config, base.model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    assert base.tokenizer.eos_token == "<|im_end|>"
    assert base.tokenizer.model_max_length == 512
    turns = [{"role": "user", "content": "hi 1"}]
    assert base.tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nhi 1<|im_end|>\n"
    again = load_base(str(file), dtype="bf16", device="cpu")
    assert again.prepare_seconds == 0
    for (name, ours), theirs in zip(again.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16()), name
    # An ordinary checkpoint: it can be saved again.
    again.model.save_pretrained(tmp_path / "again")


def test_the_folder_is_plain_and_stamped(file: Path, model: Any) -> None:
    folder, _ = read_dequantized(file)
    stamp = json.loads((folder / "slimtune.json").read_text())
    assert stamp["source"] == "tiny.gguf"
    assert stamp["dtype"] == "float32"
    assert folder.name == f"tiny-{stamp['sha256'][:16]}-fp32-v1"
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(stamp["files"])
    assert not list(folder.glob("*.bin"))
    assert (folder.stat().st_mode & 0o777, (folder / "model.safetensors").stat().st_mode & 0o777) == (0o755, 0o644)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    assert config["tie_word_embeddings"] is True
    assert load_config(str(file)).hidden_size == model.config.hidden_size


@pytest.mark.parametrize(("pre", "first"), [("smollm", ["a", "Ġ", "Ġ", "1"]), ("gpt-2", ["a", "Ġ", "Ġ1"])])
def test_digits_are_split_as_the_vocabulary_was_made(
    tmp_path: Path, model: Any, tokenizer: Any, pre: str, first: list[str]
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre=pre)
    loaded = load_tokenizer(str(file))
    assert loaded.convert_ids_to_tokens(loaded("a  1", add_special_tokens=False).input_ids) == first
    assert loaded.decode(loaded("a  1", add_special_tokens=False).input_ids) == "a  1"


def test_an_unknown_splitting_is_said_aloud(
    tmp_path: Path, model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    read_dequantized(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="of-tomorrow"))
    assert "splits text as 'of-tomorrow'" in caplog.text


def test_llama3_scaling_is_recognised(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    table = llama3_divisors(10000.0, 8, 32.0).numpy()
    base = load_base(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, rope_freqs=table)), dtype="fp32")
    rope = base.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 10000.0)
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(base.model.model.rotary_emb.inv_freq.cpu(), (plain / torch.tensor(table)).float())


def test_other_scaling_is_refused(tmp_path: Path, model: Any, tokenizer: Any, cache: Path) -> None:
    table = llama3_divisors(10000.0, 8, 17.0).numpy()
    refused(
        write_gguf(tmp_path / "a.gguf", model, tokenizer, rope_freqs=table), ModelError, "scales its rotary positions"
    )
    refused(write_gguf(tmp_path / "b.gguf", model, tokenizer, scaling="yarn"), ModelError, "yarn", "Hugging Face")
    assert left(cache) == []


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_file_cut_short(file: Path, cache: Path, part: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    refused(file, ModelError, "tiny.gguf", "a whole and undamaged GGUF file", "download")
    assert left(cache) == []


def test_a_file_that_is_no_gguf(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 zip")
    refused(file, ModelError, "is no GGUF file", r"begins with b'PK\x03\x04'")
    file.write_bytes(b"")
    refused(file, ModelError, "is no GGUF file", "it is empty")
    assert left(cache) == []


def test_a_missing_weight_is_never_filled_at_random(tmp_path: Path, model: Any, tokenizer: Any, cache: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", model, tokenizer, drop="model.layers.1.mlp.up_proj.weight")
    refused(file, ModelError, "lacks 1 weights", "layers.1.mlp.up_proj.weight")
    assert left(cache) == []


def test_weights_that_are_no_numbers(tmp_path: Path, model: Any, tokenizer: Any, cache: Path) -> None:
    refused(write_gguf(tmp_path / "x.gguf", model, tokenizer, poison=True), ModelError, "damaged", "down_proj")
    assert left(cache) == []


def test_a_missing_gguf_package_names_the_fix(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    refused(file, ModelError, "needs the package gguf", "pip install gguf")


class SafetensorError(Exception):
    """As safetensors raises it: no OSError, the reason only in the text."""


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing_behind(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def save(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save)
        refused(file, RunError, "the disk is full", "MiB free", "expected:")
    assert left(cache) == []
    assert read_dequantized(file)[0].is_dir()


def test_a_nearly_full_disk_is_noticed_before_writing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refused(file, RunError, "the disk is full", "(1.0 MiB free)", "64.1 MiB free", "SLIMTUNE_CACHE")
    assert left(cache) == []


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "taken"))
    refused(file, RunError, "cannot be written", "SLIMTUNE_CACHE")


def test_a_damaged_cache_is_made_again(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = read_dequantized(file)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    same, seconds = read_dequantized(file)
    assert same == folder
    assert seconds > 0
    assert "damaged" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == whole


def test_leftovers_of_a_killed_process_are_cleared(file: Path, cache: Path) -> None:
    folder, _ = read_dequantized(file)
    shutil.rmtree(folder)
    (cache / f".{folder.name}.tmp-killed").mkdir()
    (cache / ".other-base.tmp-running").mkdir()
    read_dequantized(file)
    assert left(cache) == sorted([folder.name, ".other-base.tmp-running"])


def test_two_at_once_do_the_work_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    found: list[Path] = []
    real = room._make

    def counted(*args: Any) -> None:
        made.append(threading.current_thread().name)
        real(*args)

    monkeypatch.setattr(room, "_make", counted)
    threads = [threading.Thread(target=lambda: found.append(read_dequantized(file)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 2
    assert found[0] == found[1]
    assert left(cache) == [found[0].name]


def test_another_content_under_the_same_name_is_another_base(
    file: Path, tiny_llama: Callable[..., Any], tokenizer: Any
) -> None:
    first, _ = read_dequantized(file)
    size = file.stat().st_size
    write_gguf(file, tiny_llama(seed=1, vocab_size=261, head_dim=8, tie_word_embeddings=True), tokenizer)
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == size
    second, _ = read_dequantized(file)
    assert first != second
    one, two = (AutoModelForCausalLM.from_pretrained(f).model.embed_tokens.weight for f in (first, second))
    assert not torch.equal(one, two)


@pytest.mark.real
def test_smollm2_survives_the_cache(smollm2_folder: Path) -> None:
    import gguf

    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    reader = gguf.GGUFReader(resolve_model("smollm2-135m").path)
    by_name = {t.name: t for t in reader.tensors}
    for name, weight in (
        ("token_embd.weight", base.model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", base.model.layers[7].mlp.down_proj.weight),
    ):
        stored = gguf.dequantize(by_name[name].data, by_name[name].tensor_type)
        assert torch.equal(torch.from_numpy(stored.copy()), weight.detach())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.eos_token_id == base.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    # Tokens as llama.cpp makes them from the same file (transformers alone would give 81, 216, 216, 37).
    assert tokenizer("a  5", add_special_tokens=False).input_ids == [81, 256, 37]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = base.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
