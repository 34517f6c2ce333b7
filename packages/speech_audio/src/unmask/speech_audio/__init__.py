"""Masked prediction for speech and sound.

Importing this package is cheap; `load` brings in torch when it is called::

    import unmask.speech_audio

    encoder = unmask.speech_audio.load("runs/hubert")
    features = encoder(encoder.preprocess(["hello.wav", "world.flac"])).pooled
"""

from unmask.core.domain import Domain

__version__ = "0.1.0"
__all__ = ["DOMAIN", "__version__", "load"]

DOMAIN = Domain(
    name="speech_audio",
    samples="recordings",
    data={"clips": "unmask.speech_audio.data.clips"},
    tasks={"representation": "unmask.speech_audio.evaluation.representation"},
    encoding="unmask.speech_audio.evaluation.embedding",
    pretrained="unmask.speech_audio.interop.pretrained",
    export="unmask.speech_audio.interop.export",
    formats={"transformers": "the encoder and the heads", "torchaudio": "the encoder"},
    report="unmask.speech_audio.report.sections",
    sets="unmask.speech_audio.data.embedded.carriers",
    checks="unmask.speech_audio.checks",
)
load = DOMAIN.load
