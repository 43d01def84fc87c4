"""The retry policy: how often, after which pauses, and which error is raised."""

import logging

import pytest

from relabel_datasets.storage import retries
from relabel_datasets.storage.retries import Failure, growing_pauses, retry


@pytest.fixture
def pauses(monkeypatch):
    """List of the pauses, which are skipped."""
    made = []
    monkeypatch.setattr(retries.time, "sleep", made.append)
    return made


def failing(num_failures, error=ConnectionError):
    """Return a function that raises `num_failures` errors and then returns the number of its calls."""
    calls = []

    def call():
        calls.append(1)
        if len(calls) <= num_failures:
            raise error(f"failure {len(calls)}")
        return len(calls)

    return call


def temporary(error):
    return Failure(OSError(f"not reached: {error}"), error, is_temporary=True, summary=f"summary of {error}")


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_temporary_failures_are_retried_after_the_given_pauses(pauses, caplog, num_failures):
    with caplog.at_level(logging.WARNING):
        assert retry(failing(num_failures), temporary, (1, 4)) == num_failures + 1
    assert pauses == [1, 4][:num_failures]
    assert caplog.messages == [
        f"summary of failure {i + 1}; next attempt in {pause}.0 s" for i, pause in enumerate(pauses)
    ]


def test_there_is_one_attempt_more_than_pauses(pauses):
    with pytest.raises(OSError, match="not reached: failure 3") as caught:
        retry(failing(3), temporary, (1, 4))
    assert str(caught.value.__cause__) == "failure 3"
    assert pauses == [1, 4]


def test_permanent_failures_are_not_retried(pauses):
    with pytest.raises(ValueError, match="refused: failure 1") as caught:
        retry(failing(9), lambda error: Failure(ValueError(f"refused: {error}")), (1, 4))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert pauses == []


def test_an_unknown_error_is_raised_unchanged(pauses):
    with pytest.raises(KeyError) as caught:
        retry(failing(9, KeyError), Failure, (1, 4))
    assert not caught.value.__suppress_context__
    assert pauses == []


def test_a_pause_is_at_least_as_long_as_the_server_asks(pauses):
    retry(failing(2), lambda error: Failure(error, is_temporary=True, min_pause_s=2.0), (1, 4))
    assert pauses == [2.0, 4]


def test_interrupts_are_not_caught(pauses):
    with pytest.raises(KeyboardInterrupt):
        retry(failing(1, KeyboardInterrupt), temporary, (1, 4))
    assert pauses == []


def test_growing_pauses_double_up_to_a_limit_with_jitter():
    pauses = list(growing_pauses(0.5, 30.0, 9))
    usual = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(0.5 * middle <= pause <= 1.5 * middle for pause, middle in zip(pauses, usual, strict=True))
    assert len(set(pauses)) == len(pauses)
