"""Stopping well: SIGTERM and Ctrl-C are noted, the step is finished, and the run is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run that was asked to stop, and was saved.

    Args:
        number: the signal.
        message: where the run stands and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


@contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """While entered, SIGINT and SIGTERM raise `Interrupted` with `message` where they find the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in StopSignals.numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class StopSignals:
    """While entered, remembers the first SIGINT or SIGTERM in `received`; a second one acts as usual."""

    numbers = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
