"""How long a step may take follows from the steps before it and from its tokens."""

import time

import pytest

from slimtune.generation import step_hang_detector
from slimtune.generation.step_hang_detector import StepHangDetector


def test_a_short_step_may_take_ten_times_as_long_as_the_slowest():
    detector = StepHangDetector()
    for seconds in (1.0, 20.0, 3.0):
        detector.record(seconds, 16)
    assert detector.calculate_limit(16) == pytest.approx(10 * (20 + 16 * 1 / 16))
    assert detector.calculate_limit(0) == 200


def test_fast_steps_have_a_floor():
    detector = StepHangDetector()
    detector.record(0.01, 4)
    assert detector.calculate_limit(4) == 60


def test_a_long_prompt_has_the_time_of_its_tokens():
    detector = StepHangDetector()
    assert detector.calculate_limit(4000) == 4000  # nothing is measured yet
    detector.record(1.0, 1)
    detector.record(4.0, 40)
    assert detector.calculate_limit(4000) == pytest.approx(10 * (4 + 4000 * 0.1))


def test_a_first_step_counts_however_slow_it_is():
    detector = StepHangDetector()
    detector.record(9000, 4000)
    assert detector.calculate_limit(4000) == pytest.approx(90_000)


def test_a_step_that_hung_and_ended_does_not_excuse_the_next():
    detector = StepHangDetector()
    detector.record(0.1, 1)
    detector.record(100, 1)
    assert detector.calculate_limit(1) == 60


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_hangs_until_it_ends(monkeypatch, fails):
    monkeypatch.setattr(step_hang_detector, "MIN_HANG_SECONDS", 0.01)
    detector = StepHangDetector()
    detector.record(1e-6, 1)
    assert detector.describe_hang() is None
    with pytest.raises(RuntimeError) if fails else pytest.MonkeyPatch.context(), detector.measure_step(1):
        time.sleep(0.02)
        assert detector.describe_hang() is not None
        if fails:
            raise RuntimeError
    assert detector.describe_hang() is None


def test_a_failed_step_says_nothing_about_the_next():
    detector = StepHangDetector()
    with pytest.raises(MemoryError), detector.measure_step(4000):
        raise MemoryError
    assert detector.calculate_limit(4000) == 4000


def test_a_step_that_others_join_is_not_measured():
    detector = StepHangDetector()
    detector.start(1)
    detector.add_tokens(4000)
    detector.finish()
    assert detector.calculate_limit(4000) == 4000
