"""The retry policy of the package: repeat a request after temporary failures, with a pause before each new attempt."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A failed attempt.

    Attributes:
        error: The error to raise if there is no further attempt.
        cause: The `__cause__` of that error. Default: none.
        is_temporary: Whether the same request may succeed later.
        summary: Text of the log record before the next attempt. Default: the error's message.
        min_pause_s: Shortest pause before the next attempt in seconds, such as the server's `Retry-After`. Default: 0.
    """

    error: Exception
    cause: BaseException | None = None
    is_temporary: bool = False
    summary: str | None = None
    min_pause_s: float = 0.0


def retry(call: Callable[[], T], explain: Callable[[Exception], Failure], pauses_s: Iterable[float]) -> T:
    """Call a function until it succeeds, fails permanently, or has used up its attempts.

    Args:
        call: Function that sends the request.
        explain: Function that describes an exception of `call`. If `Failure.error` is that exception, it is raised unchanged.
        pauses_s: Pauses between attempts in seconds. There is one attempt more than pauses.

    Returns:
        The result of `call`.

    Raises:
        Exception: `Failure.error` of the last attempt.
    """
    for pause in (*pauses_s, None):
        try:
            return call()
        except Exception as error:
            failure = explain(error)
            if pause is None or not failure.is_temporary:
                if failure.error is error:
                    raise
                raise failure.error from failure.cause
            wait_s = max(pause, failure.min_pause_s)
            logger.warning("%s; next attempt in %.1f s", failure.summary or failure.error, wait_s)
        time.sleep(wait_s)
    raise AssertionError


def growing_pauses(first_s: float, longest_s: float, count: int) -> Iterator[float]:
    """Yield pauses that double from one to the next, each multiplied by a random factor between 0.5 and 1.5.

    Args:
        first_s: First pause in seconds, before the random factor.
        longest_s: Upper bound of a pause in seconds, before the random factor.
        count: Number of pauses.
    """
    for i in range(count):
        yield min(first_s * 2**i, longest_s) * random.uniform(0.5, 1.5)
