"""A GGUF file as a base: the cached folder gives the file's own model and tokenizer, or the file is refused."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import threading
from pathlib import Path
from random import Random

import pytest
import torch
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slimtune.core.foundation.fingerprint import config_fingerprint
from slimtune.core.models.base_config import load_base_config, load_convertible_base_config
from slimtune.core.models.loader import load_base, load_tokenizer
from slimtune.core.models.model_source import resolve_model_source
from slimtune.errors import ModelError, RunError
from slimtune.extras import gguf_loading as gguf
from slimtune.extras.gguf_loading import (
    get_or_make_hf_folder_and_seconds,
    get_slimtune_cache_root,
    open_checked_gguf_reader,
)

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def write(tmp_path, tiny_llama, tiny_tokenizer):
    """Write a GGUF file of a tiny Llama: `write(seed=0, tied=True, **options of write_gguf)`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Ġa", "Ġ1"])

    def write(seed=0, tied=True, **options):
        model = tiny_llama(seed=seed, vocab_size=261, head_dim=8, tie_word_embeddings=tied)
        return write_gguf(tmp_path / "tiny.gguf", model, tokenizer, **options)

    return write


def describe(config):
    written = ("dtype", "transformers_version", "quantization_config", "architectures")
    return {k: v for k, v in config.to_dict().items() if k not in written and not k.endswith("_name_or_path")}


def test_config_of_a_cached_base_is_read_without_parsing_the_file(write, monkeypatch):
    file = write()
    parsed = describe(load_base_config(str(file)).config)
    get_or_make_hf_folder_and_seconds(file)
    monkeypatch.setattr(gguf, "open_gguf_reader", lambda _: pytest.fail("the file was parsed"))
    assert describe(load_base_config(str(file)).config) == parsed


def test_config_of_a_base_without_a_folder_is_parsed_once(write, cache, monkeypatch):
    file = write()
    parsed = gguf.read_config(file)
    monkeypatch.setattr(gguf, "open_gguf_reader", lambda _: pytest.fail("the file was parsed"))
    assert describe(gguf.read_config(file)) == describe(parsed)
    assert [f.name.endswith(".config.json") for f in cache.iterdir()] == [True]


def test_a_changed_file_has_another_config(write):
    assert gguf.read_config(write()).tie_word_embeddings
    assert not gguf.read_config(write(tied=False)).tie_word_embeddings


def test_a_damaged_cached_config_is_made_again(write, cache):
    file = write()
    parsed = gguf.read_config(file)
    (config,) = cache.iterdir()
    config.write_text(config.read_text()[:100])
    assert describe(gguf.read_config(file)) == describe(parsed)


def test_a_cache_that_cannot_be_written_costs_only_time(write, cache):
    file = write()
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("no folder")
    assert gguf.read_config(file).hidden_size == 32


def test_a_file_is_parsed_once_for_config_weights_and_tokenizer(write, monkeypatch):
    file, opened = write(), []
    original = gguf.import_gguf().GGUFReader.__init__

    def count(reader, *args, **options):
        opened.append(reader)
        original(reader, *args, **options)

    monkeypatch.setattr(gguf.import_gguf().GGUFReader, "__init__", count)
    get_or_make_hf_folder_and_seconds(file)
    assert len(opened) == 1


def test_the_tokenizer_of_a_cached_base_is_read_without_parsing_the_file(write, monkeypatch):
    file = write()
    first = load_tokenizer(str(file))
    monkeypatch.setattr(gguf, "open_gguf_reader", lambda _: pytest.fail("the file was parsed"))
    again = load_tokenizer(str(file))
    assert again.get_vocab() == first.get_vocab()
    assert again("say 12")["input_ids"] == first("say 12")["input_ids"]


def test_cache_needs_no_locks(write, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert get_or_make_hf_folder_and_seconds(write())[0].is_dir()


def assert_refused(file, kind, *words):
    with pytest.raises(kind) as caught:
        get_or_make_hf_folder_and_seconds(file)
    for word in words:
        assert word in str(caught.value)
    assert cached_folders() == []


def cached_folders():
    return sorted(p.name for p in (get_slimtune_cache_root() / "bases").glob("*") if not p.name.endswith(".lock"))


def llama3_divisors(factor, theta=10000.0, head_dim=8):
    """Divisors of the rotary frequencies (Llama 3.1): 1 for short waves, `factor` for long."""
    waves = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((8192 / waves - 1) / 3).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def test_cache_root(monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", "/a")
    assert get_slimtune_cache_root() == Path("/a")
    monkeypatch.delenv("SLIMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert get_slimtune_cache_root() == Path("/b/slimtune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert get_slimtune_cache_root() == Path.home() / ".cache" / "slimtune"


@pytest.mark.parametrize("tied", [True, False])
def test_same_model(tmp_path, write, tiny_llama, tied, capsys):
    model = tiny_llama(vocab_size=261, head_dim=8, tie_word_embeddings=tied)
    file = write(tied=tied)
    base = load_base(str(file), dtype="fp32", device="cpu")
    assert capsys.readouterr().out == ""
    assert base.prepare_seconds > 0
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied
    assert base.fingerprint == config_fingerprint(model.config)
    for config in (base.model.config, base.model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert (base.tokenizer.eos_token, base.tokenizer.model_max_length) == ("<|im_end|>", 512)
    turns = [{"role": "user", "content": "hi 1"}]
    assert base.tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nhi 1<|im_end|>\n"
    again = load_base(str(file), dtype="bf16", device="cpu")
    assert again.prepare_seconds == 0
    for (name, loaded), original in zip(again.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(loaded, original.bfloat16()), name
    again.model.save_pretrained(tmp_path / "again")  # it is an ordinary model


def test_folder(write):
    file = write()
    folder, _ = get_or_make_hf_folder_and_seconds(file)
    stamp = json.loads((folder / "slimtune.json").read_text())
    assert stamp["source"] == "tiny.gguf"
    assert folder.name == f"tiny-{stamp['sha256'][:16]}-fp32-v1"
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(stamp["files"])
    assert (folder.stat().st_mode & 0o777, (folder / "model.safetensors").stat().st_mode & 0o777) == (0o755, 0o644)
    config = json.loads((folder / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "_model_name_or_path"}
    assert load_convertible_base_config(str(file)).hidden_size == config["hidden_size"] == 32


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["a", "Ġ", "Ġ", "1"]), ("gpt-2", ["a", "Ġ", "Ġ1"])])
def test_digit_splitting(write, pre, expected):
    tokenizer = load_tokenizer(str(write(pre=pre)))
    ids = tokenizer("a  1", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids) == "a  1"


def test_unknown_splitting_warns(write, caplog):
    get_or_make_hf_folder_and_seconds(write(pre="of-tomorrow"))
    assert "'of-tomorrow'" in caplog.text


def test_llama3_scaling(write):
    divisors = llama3_divisors(32.0)
    base = load_base(str(write(rope_freqs=divisors.numpy())), dtype="fp32")
    rope = base.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 10000.0)
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(base.model.model.rotary_emb.inv_freq.cpu(), (plain / divisors).float())


def test_other_scaling_is_refused(write):
    assert_refused(write(rope_freqs=llama3_divisors(17.0).numpy()), ModelError, "scales its rotary positions")
    assert_refused(write(scaling="yarn"), ModelError, "yarn", "Hugging Face")


@pytest.mark.parametrize("part", [0, 0.02, 0.5, 0.99])
def test_incomplete_file(write, part):
    file = write()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    assert_refused(file, ModelError, "tiny.gguf", "a whole and undamaged GGUF file", "download")


def test_damaged_files(write, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 zip")
    assert_refused(tmp_path / "x.gguf", ModelError, "x.gguf", "a whole and undamaged GGUF file")
    assert_refused(tmp_path / "missing.gguf", ModelError, "cannot be read")
    missing = "model.layers.1.mlp.up_proj.weight"
    assert_refused(write(drop=missing), ModelError, "lacks 1 weights", missing)
    assert_refused(write(poison=True), ModelError, "damaged", "down_proj", "NaN")


def set_value(file, name, value, form="<I"):
    """Overwrite a number in the metadata of a file."""
    from gguf import GGUFReader

    data, field = bytearray(file.read_bytes()), GGUFReader(file).fields[name]
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])
    struct.pack_into(form, data, at, value)
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("llama.block_count", 2**31, "2147483648 layers by its metadata, and tensors of 2"),
        ("llama.rope.dimension_count", 10**6, "rope.dimension_count is 1000000, and no tensor"),
        ("llama.context_length", 0, "context_length is 0"),
        ("llama.attention.layer_norm_rms_epsilon", 33, "outside of 1e-15 to 0.1"),
        ("llama.rope.freq_base", 0x7F800000, "freq_base is inf"),
        ("tokenizer.ggml.eos_token_id", 999, "eos_token_id is 999, and there are 261 tokens"),
    ],
)
def test_metadata_that_contradict_the_tensors(write, name, value, words):
    file = set_value(write(), name, value)
    assert_refused(file, ModelError, "is damaged", words)
    with pytest.raises(ModelError, match="damaged"):
        load_base_config(str(file))


@pytest.mark.parametrize("name", ["tokenizer.ggml.eos_token_id", "llama.attention.layer_norm_rms_epsilon"])
def test_misspelt_metadata(write, name):
    """transformers would take the default of another model for what it does not find."""
    file = write()
    file.write_bytes(file.read_bytes().replace(name.encode(), name[:-1].encode() + b"#"))
    assert_refused(file, ModelError, "is damaged", f"lacks {name!r}")


def test_random_damage(write):
    """Bytes of the header, changed at random: a message, or a base that the file describes consistently."""
    file, random = write(), Random(0)
    whole = file.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        at = random.randrange(4, 6000)
        data[at : at + 8] = random.choice([bytes(8), b"\xff" * 8, struct.pack("<Q", 2**31), random.randbytes(1)])
        file.write_bytes(data)
        with contextlib.suppress(ModelError):
            open_checked_gguf_reader(file)


def test_package_missing(write, monkeypatch):
    file = write()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert_refused(file, ModelError, "needs a package", "pip install gguf")


def test_full_disk(write, monkeypatch):
    def save(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", save)
        assert_refused(file, RunError, "the disk is full", "MiB free")
    assert get_or_make_hf_folder_and_seconds(file)[0].is_dir()


def test_too_little_space(write, monkeypatch):
    file = write()
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert_refused(file, RunError, "the disk is full", "(1.0 MiB free)", "64.1 MiB free", "SLIMTUNE_CACHE")


def test_cache_not_writable(write, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="SLIMTUNE_CACHE"):
        get_or_make_hf_folder_and_seconds(write())


def test_damaged_cache_is_rewritten(write, caplog):
    folder, _ = get_or_make_hf_folder_and_seconds(write())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert get_or_make_hf_folder_and_seconds(write())[0] == folder
    assert "damaged" in caplog.text
    assert weights.read_bytes() == whole


def test_temporary_folders_of_killed_processes_are_deleted(write, cache):
    folder, _ = get_or_make_hf_folder_and_seconds(write())
    shutil.rmtree(folder)
    (cache / f".{folder.name}.killed").mkdir()
    (cache / ".other-base.running").mkdir()
    get_or_make_hf_folder_and_seconds(write())
    assert cached_folders() == sorted([folder.name, ".other-base.running"])


def test_two_processes_write_once(write, monkeypatch):
    file, written, found = write(), [], []
    write_folder = gguf._write_folder

    def count(*args):
        written.append(1)
        write_folder(*args)

    monkeypatch.setattr(gguf, "_write_folder", count)
    threads = [
        threading.Thread(target=lambda: found.append(get_or_make_hf_folder_and_seconds(file)[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert [f.name for f in found] == cached_folders() * 2


def test_changed_file_is_another_base(write):
    first, _ = get_or_make_hf_folder_and_seconds(write())
    file = write(seed=1)
    os.utime(file, ns=(1, 1))
    second, _ = get_or_make_hf_folder_and_seconds(file)
    a, b = (AutoModelForCausalLM.from_pretrained(f).model.embed_tokens.weight for f in (first, second))
    assert not torch.equal(a, b)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2(smollm2_folder):
    import gguf

    base = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    tensors = {t.name: t for t in gguf.GGUFReader(resolve_model_source("smollm2-135m").path).tensors}
    for name, weight in (
        ("token_embd.weight", base.model.embed_tokens.weight),
        ("blk.7.ffn_down.weight", base.model.layers[7].mlp.down_proj.weight),
    ):
        stored = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(torch.from_numpy(stored.copy()), weight.detach())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    # Tokens as llama.cpp makes them from the same file (transformers alone would give 81, 216, 216, 37).
    assert tokenizer("a  5", add_special_tokens=False).input_ids == [81, 256, 37]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        out = base.generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])
