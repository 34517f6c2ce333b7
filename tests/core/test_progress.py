"""Progress where there is no terminal: lines now and then, and none of what is done at once."""

from __future__ import annotations

import pytest

from unmask.core import progress
from unmask.core.progress import progress_bar, progress_shown


def test_a_log_gets_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress_bar("encoding", 2000) as advance:
        for _ in range(8):  # of 4 seconds and 250 samples
            now[0] += 4.0
            advance(250)
    said = capsys.readouterr()
    assert said.err.splitlines() == ["encoding: 750 of 2,000  20 s left", "encoding: 1,500 of 2,000  8 s left"]
    assert said.out == ""


def test_what_is_done_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("encoding", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_a_quiet_run_has_no_progress_within_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with progress_shown(False), progress_bar("encoding", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
    with progress_bar("encoding", 10) as advance:
        advance(10)
    assert capsys.readouterr().err.startswith("encoding: 10 of 10")
