"""Throughput and MFU between two readings."""

from __future__ import annotations

import pytest

from unmask.core.training import monitor
from unmask.core.training.monitor import Meter


def test_rates_are_of_the_time_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    meter = Meter(flops_per_sample=3e9, peak=1e12)

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            meter.add(32)
        now[0] += seconds

    steps(5, 2.0)
    assert meter.read() == {"seconds": 2.0, "samples_per_second": 80.0, "mfu": 0.24}
    steps(1, 4.0)
    assert meter.read() == {"seconds": 6.0, "samples_per_second": 8.0, "mfu": 0.024}
    steps(3, 1.0)
    meter.skip()  # those three and what followed them went into a validation
    steps(2, 1.0)
    assert meter.read() == {"seconds": 8.0, "samples_per_second": 64.0, "mfu": 0.192}


def test_no_mfu_where_the_peak_is_not_known() -> None:
    meter = Meter()
    meter.add(8)
    assert set(meter.read()) == {"seconds", "samples_per_second"}
