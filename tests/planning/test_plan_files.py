"""Sizes of files before they exist, against the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.cases import CASES
from models_zoo import gpt2, llama, tokens
from safetensors.torch import save as to_bytes
from training.tiny_run import recipe_of, write_rows
from transformers import AutoConfig, LlamaConfig

import slimtune.models
from slimtune import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from slimtune.adapters import state_dict
from slimtune.planning.file_sizes import BESIDE, adapter_bytes, checkpoint_bytes, file_bytes, run_bytes, writing_bytes
from slimtune.setup import build_meta_model
from slimtune.training import checkpoint
from slimtune.training.train import train

ZOO = {"llama": llama, "gpt2": gpt2}
FP32 = torch.float32


def config(method, base="llama"):
    return CASES[method](**(CASES[method].on_gpt2 if base == "gpt2" else {}))


def written(model, folder: Path) -> int:
    state_dict.save_adapter(model, folder, "default")
    return (folder / state_dict.WEIGHTS_FILE).stat().st_size


def planned(base, method, dtype=FP32) -> tuple[int, bool]:
    return adapter_bytes(build_meta_model(base.config, method, dtype))


def train_steps(model, steps: int) -> None:
    """Take some of a longer training's steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.peft_config["default"].on_train_begin(2 * steps)
    for step in range(steps):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.update_and_allocate(step + 1)
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ZOO)
@pytest.mark.parametrize("method", sorted(CASES))
def test_an_adapters_file_is_known_to_the_byte(method, base, dtype, tmp_path):
    model = get_peft_model(ZOO[base](dtype=dtype), config(method, base))
    size, at_most = planned(ZOO[base](dtype=dtype), config(method, base), dtype)
    if not at_most:
        assert size == written(model, tmp_path)
        return
    train_steps(model, 4)
    assert written(model, tmp_path) <= size


def test_what_training_makes_smaller_is_known_at_most(tmp_path):
    settings = {"init_r": 12, "target_r": 2, "target_modules": "all-linear"}
    model = get_peft_model(llama(dtype=FP32), AdaLoraConfig(**settings))
    size, at_most = planned(llama(), AdaLoraConfig(**settings))
    assert at_most
    before = written(model, tmp_path)
    assert before <= size < 1.02 * before
    train_steps(model, 4)
    assert written(model, tmp_path) < 0.9 * before


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 9, "down_proj": 2}}], ids=str)
def test_ranks_from_data_are_known_at_most(more, tmp_path):
    def made():
        return LoraConfig(**{**settings, "eva_config": EvaConfig(rho=3), "init_lora_weights": "eva"})

    def base():
        return llama(dtype=FP32, hidden_size=128, intermediate_size=512)

    settings = {"r": 4, "target_modules": "all-linear", **more}
    size, at_most = planned(base(), made())
    as_given, _ = planned(base(), LoraConfig(**settings))
    assert at_most
    # The data that take most give every rank to the largest layers.
    model = get_peft_model(base(), made())
    layers = {n: d.lora_A.weight for n, d in model.adapter_modules("default").items()}
    left, found = sum(map(len, layers.values())), {}
    for name in sorted(layers, key=lambda n: ("mlp" in n, "q_proj" in n or "o_proj" in n), reverse=True):
        width = layers[name].shape[1]
        rank = min(left, 3 * max(len(A) for A in layers.values() if A.shape[1] == width))
        left -= rank
        found[name] = torch.zeros(rank, width)
    initialize_lora_eva_weights(model, eva_state_dict=found)
    most = written(model, tmp_path / "most")
    assert 1.1 * as_given < most <= size < 1.05 * most
    model = get_peft_model(base(), made())
    initialize_lora_eva_weights(model, [{"input_ids": tokens(8, 32, seed=s)} for s in range(2)], max_batches=2)
    assert written(model, tmp_path / "some") <= size


def test_the_rank_16_adapter_of_the_8b_is_27_mb():
    known = json.loads(Path(slimtune.models.__file__).with_name("known.json").read_text())
    base = LlamaConfig(**{k: v for k, v in known["llama-3.1-8b"]["config"].items() if k != "model_type"})
    model = build_meta_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), torch.bfloat16)
    values = 32 * 16 * ((4096 + 4096) + (4096 + 1024)) * 4
    assert adapter_bytes(model) == (27_280_184, False)
    assert 0 < 27_280_184 - values < 18_000  # a header of 128 tensors


@pytest.mark.parametrize("base", [llama(dtype=FP32), llama(dtype=FP32, tie=True), gpt2(dtype=FP32)])
def test_of_a_model_without_an_adapter_the_weights_are_meant(base, tmp_path):
    base.save_pretrained(tmp_path)
    assert planned(base, None) == ((tmp_path / "model.safetensors").stat().st_size, False)


# --- the format -------------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64,
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TENSORS = st.dictionaries(
    TEXT.filter(lambda name: name != "__metadata__"),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 12), max_size=3),
        st.sampled_from(DTYPES),
    ),
    max_size=30,
)


@given(TENSORS, st.none() | st.dictionaries(TEXT, TEXT, max_size=3))
def test_a_file_is_as_large_as_safetensors_makes_it(tensors, metadata):
    size = len(to_bytes(tensors, metadata))
    assert file_bytes({k: t.to("meta") for k, t in tensors.items()}, metadata) == size


def test_at_most_holds_in_any_order():
    def tensors(large: int) -> dict[str, torch.Tensor]:
        return {f"{i}": torch.zeros(10**5 if i == large else 1) for i in range(100, 200)}

    late, early = tensors(199), tensors(100)  # where it lies early, what follows has long offsets
    total = sum(t.nbytes for t in late.values())
    assert file_bytes(late) < len(to_bytes(early)) <= file_bytes(late, at_most=total) < 1.01 * file_bytes(late)


def test_thousands_of_tensors_are_counted_to_the_byte():
    names = [f"layers.{i}.{n}" for i in range(1500) for n in ("a", "b", "ä")]
    tensors = {n: torch.zeros(i % 7, 1 + i % 2000, dtype=DTYPES[i % 4]) for i, n in enumerate(names)}
    assert file_bytes(tensors, {}) == len(to_bytes(tensors, {}))


# --- a run ------------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, pattern: str = "*") -> int:
    return sum(p.stat().st_size for p in folder.rglob(pattern) if p.is_file())


@pytest.mark.parametrize(
    "method",
    [{"name": "lora", "r": 4}, {"name": "lora", "r": 4, "lr_ratio": 4, "bias": "all"}, {"name": "adalora"}],
    ids=["lora", "lora+", "adalora"],
)
def test_a_run_stays_below_its_plan(method, tiny_folder, tmp_path, monkeypatch):
    recipe = recipe_of(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {
                "train": str(write_rows(tmp_path / "train.jsonl", 24)),
                "validation": str(write_rows(tmp_path / "validation.jsonl", 6, start=100)),
            },
            "method": method,
            "train": {"epochs": 2, "batch_size": 4, "save_steps": 1, "eval_steps": 1, "save_total_limit": 2},
            "output_dir": str(tmp_path / "run"),
        }
    )
    model = build_meta_model(AutoConfig.from_pretrained(tiny_folder), recipe.method_config(), FP32)
    most: dict[str, int] = {"run": 0, "files": 0, "beside": 0}
    rotate = checkpoint.delete_old_checkpoints

    def watched(root: Path, *args) -> None:
        newest = checkpoint.list_checkpoints(root)[-1]
        files = sum(p.stat().st_size for p in newest.glob("*.safetensors") if p.name != "rng.safetensors")
        found = {"run": on_disk(root.parent), "files": files, "beside": on_disk(newest) - files}
        most.update({k: max(most[k], v) for k, v in found.items()})
        rotate(root, *args)

    monkeypatch.setattr(checkpoint, "delete_old_checkpoints", watched)
    folder = Path(train(recipe)["run"])
    large = checkpoint_bytes(model) - BESIDE
    assert most["files"] <= large < 1.05 * most["files"]
    assert most["beside"] < BESIDE / 10
    assert 3 * most["files"] < max(most["run"], on_disk(folder)) <= run_bytes(model, 2)


def test_each_file_is_there_twice_while_it_is_written():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of this process cannot be started anew")

    def now(what: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
        return int(line.split()[1]) * 1024

    values = torch.ones(2**24)
    before = now("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    size = len(to_bytes({"values": values}))
    assert now("VmHWM") - before == pytest.approx(2 * size, rel=0.1)


def test_writing_takes_the_largest_file():
    model = build_meta_model(llama().config, LoraConfig(r=8, target_modules="all-linear"), FP32)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = 2 * trained
    assert 2 * moments < writing_bytes(model, device="cpu") < 1.5 * 2 * moments
    assert writing_bytes(model, device="cuda") == 1.5 * writing_bytes(model, device="cpu")
    assert writing_bytes(model, "sgd") == 3 * adapter_bytes(model)[0]  # it keeps nothing
