"""The number of threads follows the load of the machine."""

import re

import pytest
import torch

from slimtune.extras.thread_count import STEPS_BETWEEN_TRIALS, ContinuousThreadCountTuner


@pytest.fixture
def machine(monkeypatch):
    """Four cores: `take(steps, speeds, share)` takes steps at the speed of each number of threads."""
    threads, said = [4], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    count = ContinuousThreadCountTuner(said.append)

    def take(steps, speeds, share):
        used = []
        for _ in range(steps):
            used.append(threads[0])
            count.after_step(1000, 1000 / speeds[threads[0]], share)
        return used

    return count, take, said


def test_contended_cores_halve_the_threads_while_that_is_faster(machine):
    _, take, said = machine
    assert take(18, {4: 2000, 2: 4000, 1: 3000}, share=0.4)[-6:] == [2] * 6
    assert [re.findall(r"\d[\d.]*", sentence) for sentence in said] == [["2", "4", "2.0"], ["2", "1"]]


def test_free_cores_get_their_threads_back(machine):
    _, take, said = machine
    take(6, {4: 2000, 2: 4000, 1: 3000}, share=0.4)
    assert take(7, {4: 8000, 2: 4000}, share=0.99)[-1] == 4
    assert re.findall(r"\d[\d.]*", said[-1])[:2] == ["4", "4"]


def test_trial_that_failed_is_not_repeated_soon(machine):
    _, take, _ = machine
    used = take(6 + STEPS_BETWEEN_TRIALS, {4: 4000, 2: 2000}, share=0.4)
    assert used.count(2) == 3


def test_quiet_machine_keeps_its_threads(machine):
    _, take, said = machine
    assert (set(take(50, {4: 4000}, share=0.95)), said) == ({4}, [])


def test_few_long_steps_are_enough(machine):
    _, take, _ = machine
    assert take(3, {4: 50, 2: 400}, share=0.3) == [4, 2, 2]  # 1000 tokens took 20 s


def test_end_of_training_restores_the_threads(machine):
    count, take, _ = machine
    take(6, {4: 2000, 2: 4000, 1: 3000}, share=0.4)
    count.restore()
    assert torch.get_num_threads() == 4


def test_resumed_training_starts_with_the_threads_of_its_checkpoint(machine):
    count, take, _ = machine
    count.start_with(2)
    assert take(2, {4: 2000, 2: 4000, 1: 3000}, share=0.4) == [2, 2]
    count.start_with(8)  # written on a larger machine
    assert take(1, {4: 2000, 2: 4000, 1: 3000}, share=0.4) == [4]
