"""`plan`, `choose`, `gpus --for` and `cost` say the same of a base on a machine, or say why they say nothing."""

import json

import pytest

from slimtune.extras.known_models import load_known_models_by_alias
from slimtune.planning.gpu_specs import list_gpu_specs

MIXTURE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
ONE_ROW = ("--max-tokens-per-micro-batch", 1)
"""`choose` sends each row through the model by itself."""
DISTANCE = {"fits": 0, "tight": 1, "does not fit": 2}

pytestmark = pytest.mark.usefixtures("kept_traces")


@pytest.fixture
def answer(slimtune):
    """Return the JSON of a command, whatever its verdict; an error must have its reason."""

    def run(*args):
        done = slimtune(*args, "--json")
        found = json.loads(done.stdout)
        assert done.exit_code in (0, 1, 2), done.stderr
        if "error" in found:
            assert found["error"]["message"]
        return found

    return run


def require_agreement(answer, base, machines):
    """Check the four commands for a base on machines."""
    chosen, listed = answer("choose", base), answer("gpus", "--for", base)
    fitting = {offer["card"] for way in ("buy", "rent") for offer in chosen.get(way, [])}
    verdicts = {card["name"]: card["verdict"] for card in listed.get("cards", [])}
    for machine in machines:
        alone, batch = answer("plan", base, "--gpu", machine, *ONE_ROW), answer("plan", base, "--gpu", machine)
        assert ("error" in batch) == (machine not in verdicts), (base, machine)
        if "error" in batch:
            left_out = {card for group in listed.get("unplanned", []) for card in group["cards"]}
            assert "error" in listed or machine in left_out, (base, machine)
            continue
        assert abs(DISTANCE[verdicts[machine]] - DISTANCE[batch["verdict"]]) <= 1, (base, machine)
        if machine in fitting:
            assert alone["verdict"] == "fits", (base, machine)
        cost = answer("cost", base, "--gpu", machine)
        assert ("error" in cost) == (batch["verdict"] == "does not fit" or batch["tokens_per_second"] is None)


@pytest.mark.slow
def test_a_mixture_on_a_card_without_bfloat16(answer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    require_agreement(answer, tmp_path, ["t4"])


@pytest.mark.parametrize(
    ("start", "step"),
    [
        *(pytest.param(start, 24, marks=pytest.mark.slow) for start in (0, 12)),
        *(pytest.param(start, 4, marks=pytest.mark.prove) for start in range(4)),  # all of them, half an hour
    ],
)
def test_a_sample_of_bases_and_machines(answer, start, step):
    """One base of each architecture, each on two machines; together they are on all machines."""
    by_type = {facts["config"]["model_type"]: name for name, facts in load_known_models_by_alias().items()}
    machines = [gpu.name for gpu in list_gpu_specs() if gpu.trains]
    for i, base in list(enumerate(by_type.values()))[start::step]:
        require_agreement(answer, base, [machines[(7 * i) % len(machines)], machines[(7 * i + 83) % len(machines)]])
