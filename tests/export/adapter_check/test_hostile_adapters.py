"""Damaged and hostile files give one clear message."""

import json
import os
import struct
from contextlib import suppress

import pytest

from slimtune.errors import AdapterError, SlimtuneError
from slimtune.export.verify import check_adapter


def huge_header(folder):
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def endless_file(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")


def pipe(folder):
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def pickle_instead(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def deep_json(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)


def huge_json(folder):
    with (folder / "adapter_config.json").open("wb") as f:
        f.truncate(1 << 30)


def mlx(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")


def link_in_a_circle(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("adapter_config.json")


@pytest.mark.parametrize("damage", [huge_header, truncate, pickle_instead, deep_json, huge_json, mlx])
def test_damaged_file_is_an_error(adapter_copy, damage):
    base, folder = adapter_copy()
    damage(folder)
    with pytest.raises(AdapterError) as caught:
        check_adapter(folder, str(base))
    assert caught.value.expected
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("damage", [endless_file, pipe, link_in_a_circle])
def test_what_is_no_file_is_not_read(slimtune, adapter_copy, damage):
    base, folder = adapter_copy()
    damage(folder)
    done = slimtune("check", folder, "--base", base, "--json")
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.stderr


VALUES = [
    {"r": "8"}, {"r": -1}, {"r": 10**9}, {"lora_alpha": None}, {"target_modules": "(.*)*!"}, {"peft_type": ["LORA"]},
    {"peft_type": "NEW"}, {"rank_pattern": []}, {"task_type": "X"}, {"modules_to_save": [""]},
    {"base_model_name_or_path": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_wrong_config_is_told(adapter_copy, values):
    base, folder = adapter_copy()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with suppress(SlimtuneError):
        result = check_adapter(folder, str(base))
        assert result.file.findings or result.file.not_proven
