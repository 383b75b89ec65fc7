"""A sample of bases and machines: each command answers or says why not, and no two answers contradict each other."""

import json

import pytest

PAIRS = [  # a family of bases and a kind of machine each
    ("gemma-3-270m", "gtx-1650"), ("llama-3.1-8b", "mi50-32gb"), ("qwen3.5-9b", "arc-b580"), ("lfm2-1.2b", "m1-8gb"),
    ("gpt-oss-20b", "rtx-5090"), ("glm-4.7-flash", "h100-sxm"), ("granite-4.0-h-tiny", "p100"),
    ("gemma-3n-e4b", "dgx-spark"), ("qwen3.5-35b-a3b", "t4"), ("smollm2-135m", "v100-16gb"), ("gpt2", "rx-7900-xtx"),
]  # fmt: skip


def ask(slimtune, *words):
    """Return what a command prints as JSON; None: it says why not."""
    done = slimtune(*words, "--json")
    assert done.exception is None or isinstance(done.exception, SystemExit), words
    if not done.stdout:
        assert "error:" in done.stderr, words
        return None
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("kept_traces")
@pytest.mark.parametrize(("base", "gpu"), PAIRS)
def test_every_command_answers_or_says_why_not(slimtune, base, gpu):
    planned = ask(slimtune, "plan", base, "--gpu", gpu, "--serve")
    served = planned["serve"] if planned else None
    if served and served["verdict"] == "does not fit":
        assert served["decode_tokens_per_second"] is None
    compared = ask(slimtune, "gpus", "--for", base)
    verdicts = {plan["card"]: plan["verdict"] for plan in compared["plans"]} if compared else {}
    if planned and gpu in verdicts and "verdict" in planned:
        assert verdicts[gpu] == planned["verdict"]
    ask(slimtune, "cost", base, "--gpu", gpu, "--tokens", "1000000")
    ask(slimtune, "cost", base, "--gpu", gpu, "--serve")


def test_a_run_that_may_never_pay_for_a_machine_has_its_schema(slimtune):
    assert ask(slimtune, "cost", "gemma-3-270m", "--gpu", "rtx-3060-12gb", "--tokens", "1000000") is not None
