"""Exports of a run on a base in 4 bits: checked on its own base, and a note says what another base changes."""

import re
from importlib.util import find_spec

import pytest
from hand_run import make_run
from tiny_gguf import write_tiny_base

from slimtune.errors import AdapterError
from slimtune.export import expected_logps as reference
from slimtune.export.exporter import export
from slimtune.export.verify import verify
from slimtune.extras.gguf_loading import get_or_make_hf_folder_and_seconds

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
NF4 = {"quantization": "nf4"}


@pytest.fixture(autouse=True)
def few_positions(monkeypatch):
    monkeypatch.setattr(reference, "MAX_POSITIONS", 60)


def test_note_on_a_16_bit_base(tiny_folder, tmp_path):
    run, plain = make_run(tmp_path / "run", tiny_folder, model=NF4), make_run(tmp_path / "plain", tiny_folder)
    found = export(run, "vllm", tmp_path / "out")
    note = found.check.reason
    assert found.check.passed is None, "the base that is served is not the one of the training"
    assert found.check.max_difference < 1e-5
    assert re.search(r"16 bits .*\b0\.", note)
    assert f"slimtune merge {run} --out FOLDER" in note
    (unmeasured,) = [n for n in export(run, "vllm", tmp_path / "two", verify=False).notes if "nf4" in n]
    assert "16 bits" in unmeasured
    assert not [n for n in export(plain, "vllm", tmp_path / "three", verify=False).notes if "16 bits" in n]


@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_loftq_is_refused_beside_another_base(to, tiny_folder, tmp_path):
    def start(model):
        model.peft_config["default"].init_lora_weights = True

    run = make_run(tmp_path / "run", tiny_folder, model=NF4, change=start)
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace("method:\n", "method:\n  init_lora_weights: loftq\n"))
    with pytest.raises(AdapterError, match="nf4") as caught:
        export(run, to, tmp_path / "out")
    assert caught.value.hint == f"slimtune merge {run} --out FOLDER, or --merged"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_all_formats_on_a_quantized_gguf(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))
    base = write_tiny_base(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer)
    run = make_run(tmp_path / "run", get_or_make_hf_folder_and_seconds(base)[0], model=NF4)
    file = run / "recipe.yaml"
    file.write_text(file.read_text().replace(f"name: {get_or_make_hf_folder_and_seconds(base)[0]}", f"name: {base}"))
    assert [c.passed for c in verify(run, threads=1).checks] == [True, True, True]
    merged = export(run, "gguf", tmp_path / "out", {"merged": True, "precision": "f32"}, threads=1)
    assert merged.check.max_difference < 0.01
    assert not [n for n in merged.notes if "16 bits" in n]
