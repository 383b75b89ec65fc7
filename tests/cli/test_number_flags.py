"""Every flag that takes a number with a fraction refuses NaN, Inf and a negative one, by its name."""

import re

import pytest

from slimtune.cli import COMMANDS

NEEDED = {
    "cost": ["gpt2", "--gpu", "t4"],
    "gpus": ["t4", "l4", "--for", "gpt2"],
    "tune": ["gpt2", "--over", "lr=1e-3"],
    "generate": ["run", "hi"],
    "repair": ["gpt2", "--for", "peft", "--out", "new"],
}
"""What a command needs besides the flag; a base or a run for the others."""
SETTINGS = {"--lr": "learning_rate", "--rank": "method.r"}


@pytest.mark.parametrize("command", COMMANDS)
def test_number_is_refused_by_its_flag(slimtune, command):
    flags = re.findall(r"^  (--[a-z-]+) NUMBER", slimtune(command, "--help").stdout, re.MULTILINE)
    for flag in flags:
        name = SETTINGS.get(flag, flag[2:].replace("-", "_"))
        for number in ("nan", "inf", "-inf", "-1"):
            done = slimtune(command, *NEEDED.get(command, ["gpt2"]), f"{flag}={number}", columns=300)
            assert done.exit_code == 2
            assert re.search(rf"({flag}|{name})\b", done.stderr), (flag, number)


def test_flags_of_prices_are_numbers(slimtune):
    assert {"--kwh-price NUMBER", "--rent NUMBER", "--price NUMBER"} <= set(
        re.findall(r"--[a-z-]+ NUMBER", slimtune("cost", "--help").stdout)
    )
