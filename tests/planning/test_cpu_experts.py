"""A mixture that a GPU does not hold, served with experts in CPU memory, against published runs of llama.cpp."""

import json
from pathlib import Path

import published_serving as published
import pytest

from slimtune.planning.cpu_experts import count_layers_on_cpu, estimate_cpu_experts, find_expert_layers
from slimtune.planning.gpu_specs import require_gpu_by_name
from slimtune.planning.interval import Interval
from slimtune.planning.serving_memory import estimate_serving_memory
from slimtune.planning.serving_speed import BATCH_TOKENS, estimate_decode_and_prefill_speed

FILE = Path(published.__file__).parent / "data" / "serving_points_cpu_experts.json"
POINTS = json.loads(FILE.read_text(encoding="utf-8"))


def plan(name, gpu, **settings):
    return estimate_serving_memory(published.load_config_of(name), gpu=require_gpu_by_name(gpu), **settings)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p['card']} {p['cpu_expert_layers']} {p['test']}")
def test_published_runs_are_inside_the_range(point):
    read, weights, structure, state, file_bytes = published.count_work_of(point["model"], point["precision"])
    scale = point["file_gib"] * 2**30 / file_bytes if "file_gib" in point else 1.0
    text, count = published.load_config_of(point["model"]).get_text_config(), point["cpu_expert_layers"]
    structure = structure._replace(all_expert_bytes=scale * structure.all_expert_bytes)
    moved = structure.all_expert_bytes * structure.expert_share * count / structure.expert_layers
    speed = estimate_decode_and_prefill_speed(
        require_gpu_by_name(point["card"]), "llama.cpp", weight_bytes_per_token=scale * read - moved,
        kv_bytes_per_request=state, matmul_weight_count=weights, layers=text.num_hidden_layers,
        vocab_size=text.vocab_size, structure=structure, batch_tokens=BATCH_TOKENS,
    )  # fmt: skip
    split = estimate_cpu_experts(
        layers=list(range(structure.expert_layers)), count=count, structure=structure, need=Interval(0, 0),
        host_bytes=0, speed=speed, read_bytes=moved,
    )  # fmt: skip
    band = split.decode_tokens_per_second if point["test"] == "decode" else split.prefill_tokens_per_second
    assert band.low <= point["tokens_per_second"] <= band.high


def test_as_few_experts_as_the_gpu_needs_are_in_cpu_memory():
    whole = plan("qwen3.6-35b-a3b", "rtx-3060-12gb")
    split = whole.cpu_experts
    assert (whole.verdict, whole.decode_tokens_per_second) == ("does not fit", None)
    assert 0 < split.layers < split.expert_layers == 40
    assert split.n_cpu_moe == split.layers
    assert split.need_bytes.high <= whole.usable_bytes.low
    layer = (whole.need_bytes.high - split.need_bytes.high) / split.layers
    assert split.need_bytes.high + layer > whole.usable_bytes.low  # with one layer fewer it does not surely fit
    assert split.host_bytes == pytest.approx(whole.host_bytes + layer * split.layers, abs=2)
    assert split.format() in dict(whole.lines())[""]
    smaller = plan("qwen3.6-35b-a3b", "gtx-1650", precision="Q3_K_M").cpu_experts
    assert smaller is None or smaller.layers > split.layers


def test_llama_cpp_counts_layers_without_experts():
    split = plan("deepseek-v3", "rtx-4090").cpu_experts  # the first three layers have none
    assert split.expert_layers == 58
    assert split.n_cpu_moe == split.layers + 3


@pytest.mark.parametrize(
    ("name", "gpu", "settings"),
    [
        ("llama-3.1-70b", "rtx-3090", {}),  # no mixture
        ("gpt-oss-20b", "rtx-3090", {}),  # it fits
        ("gpt-oss-120b", "m4-max-64gb", {}),  # memory of the CPU is the GPU's
        ("gpt-oss-120b", "rtx-3090", {"engine": "vllm"}),
    ],
)
def test_only_a_mixture_that_does_not_fit_is_split(name, gpu, settings):
    assert plan(name, gpu, **settings).cpu_experts is None


def test_experts_that_are_not_enough_leave_no_answer():
    assert count_layers_on_cpu(100, 50, 40, 10) is None
    assert count_layers_on_cpu(100, 50, 0, 0) is None
    assert count_layers_on_cpu(100, 99, 40, 10) == 1
    assert count_layers_on_cpu(100, 60, 40, 10) == 10


def test_layers_are_read_from_names_of_parameters():
    names = [f"model.layers.{n}.mlp.experts.{m}" for n in (3, 10, 4) for m in ("gate_up_proj", "down_proj")]
    assert find_expert_layers(names) == [3, 4, 10]
