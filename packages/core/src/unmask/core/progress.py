"""Progress of what takes more than a few seconds, apart from training, which has its own.

On a terminal that is a bar; elsewhere, in a log, a plain line every ten seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Advance = Callable[[int], Any]
EVERY_SECONDS = 10.0
_SHOWN: ContextVar[bool] = ContextVar("progress_shown", default=True)


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Whether `progress_bar` shows anything within this block: ``--quiet`` holds for all that a run does."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Advance]:
    """Progress on stderr, a bar or lines; the value takes the number of samples just done."""
    if not _SHOWN.get():
        yield lambda n: None
        return
    if not sys.stderr.isatty():
        yield _Lines(text, total).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda n: bar.advance(task, n)


class _Lines:
    """A line whenever the last one is ten seconds old; nothing of what is done sooner."""

    def __init__(self, text: str, total: int) -> None:
        self.text, self.total, self.done = text, total, 0
        self.began = self.last = time.perf_counter()

    def advance(self, n: int) -> None:
        self.done += n
        now = time.perf_counter()
        if self.done and now - self.last >= EVERY_SECONDS:
            self.last = now
            left = (now - self.began) / self.done * max(0, self.total - self.done)
            print(f"{self.text}: {self.done:,} of {self.total:,}  {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
