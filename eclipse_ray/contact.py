"""First contact with a cluster, a dashboard, a store or a source of credentials: how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Thread, Timer
from typing import TypeVar

from eclipse_ray.log import say

T = TypeVar("T")

CONTACT_SECONDS = 60.0
"""The longest time that a first contact may take, with all its retries."""
ANSWER_SECONDS = 20.0
"""The longest time that one request of a first contact may take."""
TELL_SECONDS = 10.0
"""After this time, people are told what is waited for."""


class NoAnswerError(TimeoutError):
    """Nothing answered within the bound."""


def first_contact(what: str, call: Callable[[], T]) -> T:
    """Return `call()`. Raises NoAnswerError after CONTACT_SECONDS; `what` says what is waited for."""
    with telling(what):
        return bounded(call, CONTACT_SECONDS)


def bounded(call: Callable[[], T], seconds: float) -> T:
    """Return `call()`, run on a thread that is left behind after `seconds`. Raises NoAnswerError then."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    if not wait([answer], timeout=max(seconds, 0.0)).done:
        raise NoAnswerError(f"nothing answered within {seconds:.0f} s")
    return answer.result()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say that `what` is waited for when the block takes longer than TELL_SECONDS."""
    timer = Timer(TELL_SECONDS, say, [f"waiting for {what}; given up after {CONTACT_SECONDS:.0f} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
