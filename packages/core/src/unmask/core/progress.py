"""Progress bars for what takes more than a few seconds, apart from training, which has its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int], Any]


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Advance]:
    """A progress bar on stderr, where that is a terminal; the value takes the number of samples just done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=total)
        yield lambda n: bar.advance(task, n)
