"""What a speech run's page says of its evaluation."""

from __future__ import annotations

import pytest

from unmask.speech_audio.evaluation.tables import Measure
from unmask.speech_audio.report.sections import _verdict


@pytest.mark.parametrize(
    ("random", "mfcc", "tone", "said"),
    [
        (0.5, 0.6, "good", "on 1 of 1 measures, and the best of all four on 1"),
        (0.5, 0.9, "plain", "on 1 of 1 measures, and the best of all four on 0"),
        (0.7, 0.6, "plain", "on 0 of 1 measures, level with it on 1, and the best of all four on 1"),
        (0.8, 0.6, "warn", "on 0 of 1 measures, and the best of all four on 0"),
    ],
)
def test_a_tie_with_the_untrained_encoder_is_no_success(random: float, mfcc: float, tone: str, said: str) -> None:
    line = Measure("class", {"trained": 0.7, "random": random, "mfcc": mfcc})
    verdict = _verdict({"labelled": True}, [line])
    assert verdict.tone == tone and said in verdict.text
