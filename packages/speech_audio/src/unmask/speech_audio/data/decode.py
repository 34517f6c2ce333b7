"""Sound files to 16 kHz mono: wav, flac, ogg and mp3 at any rate and with any number of channels.

Files are read with libsndfile. Channels are averaged; other rates are resampled by `torchaudio.functional.resample`
(a Hann-windowed sinc of 6 zero crossings). A part of a file is read, and resampled, from that part of the disk alone,
and has the samples that the whole would have there. Of mp3 files up to 10 s before it are decoded, too.
"""

from __future__ import annotations

import io
import math
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unmask.core.data.kinds import CorruptSampleError
from unmask.speech_audio.data.frames import SAMPLE_RATE

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
FULL_SCALE = 32767 / 32768
CLIPPED_SHARE = 0.01
_WIDTH = 6  # zero crossings on either side of the resampling filter: torchaudio's default
_LARGEST = 640  # denominator of a resampling ratio; see `ratio`
_MP3_LEAD = 10  # seconds decoded before a part of an mp3; its frames need those before, 20 or so at a low bit rate
_ONE_AT_A_TIME = threading.Lock()  # stderr is one for all threads
_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # what a program that wrote a wav to a pipe leaves in its header


@dataclass(frozen=True)
class Header:
    """What a file's header says.

    Args:
        frames: samples of each channel, at the file's own rate.
        rate: that rate in Hz.
        float: whether the samples are floating point, and so may be NaN or infinite.
    """

    frames: int
    rate: int
    float: bool = False

    @property
    def samples(self) -> int:
        """Samples at 16 kHz, rounded up."""
        return math.ceil(self.frames / ratio(self.rate)) if self.rate > 0 else 0


@dataclass(frozen=True)
class Sound:
    """Decoded audio.

    Args:
        audio: 16 kHz mono, about [-1, 1].
        clipped: share of the file's own samples (of what was read) that are at full scale.
    """

    audio: Float[Tensor, "samples"]
    clipped: float = 0.0


def ratio(rate: int) -> Fraction:
    """File samples per output sample. Exact for every usual rate, else the nearest with a denominator up to 640.

    The resampling filter has numerator x denominator taps: for 22,051 Hz taken exactly that would be 1.4 GB. The
    nearest ratio is off by 0.08 % at the very worst, a hundredth of a semitone.
    """
    return Fraction(rate, SAMPLE_RATE).limit_denominator(_LARGEST)


def resample(audio: Float[Tensor, "frames"], rate: int) -> Float[Tensor, "samples"]:
    """Mono audio at 16 kHz."""
    step = ratio(rate)
    if step == 1 or len(audio) == 0:
        return audio
    from torchaudio.functional import resample as sinc

    return sinc(audio, step.numerator, step.denominator, lowpass_filter_width=_WIDTH)


def examine(file: Path | BinaryIO) -> Header:
    """The header of a file; its end is looked at as well, so that a file that was cut off is found here.

    Raises:
        CorruptSampleError: empty, not audio, or cut off; the message is the reason alone, without a name.
        OSError: the storage does not answer.
    """
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return examine(stream)
    head = file.read(64)
    if not head:
        raise CorruptSampleError("empty file")
    size = file.seek(0, io.SEEK_END)
    _check_whole(file, head, size)
    file.seek(0)
    with _open(file) as sound:
        if sound.frames <= 0:
            raise CorruptSampleError("holds no samples")
        header = Header(sound.frames, sound.samplerate, sound.subtype in ("FLOAT", "DOUBLE"))
        if len(_read_frames(sound, header.frames - 1, 1)) < 1:
            raise CorruptSampleError("cut off: its last sample cannot be read")
    return header


def read(file: Path | BinaryIO, header: Header, start: int = 0, stop: int | None = None) -> Sound:
    """Decode a file, or samples `start` to `stop` of it (at 16 kHz), without decoding the rest.

    NaN and infinite samples are looked for in what is decoded.

    Raises:
        CorruptSampleError: not audio, damaged, shorter than its header says, or with NaN or infinite samples; the
            message is the reason alone, without a name.
        OSError: the storage does not answer.
    """
    step, total = ratio(header.rate), header.samples
    stop = total if stop is None else min(stop, total)
    # Reading starts where a file sample and an output sample coincide, and wide enough for the filter on both sides.
    margin = math.ceil(2 * _WIDTH * max(step, Fraction(1)) / step) if step != 1 else 0
    first = max(start - margin, 0) // step.denominator * step.denominator
    begin, end = int(first * step), min(math.ceil((stop + margin) * step), header.frames)
    if isinstance(file, Path):
        with file.open("rb") as stream, _open(stream) as sound:
            frames = _frames(sound, begin, end)
    else:
        with _open(file) as sound:
            frames = _frames(sound, begin, end)
    clipped = float((np.abs(frames).max(1) >= FULL_SCALE).mean()) if len(frames) else 0.0
    if header.float and not np.isfinite(frames).all():
        raise CorruptSampleError("has NaN or infinite samples")
    audio = resample(torch.from_numpy(frames[:, 0] if frames.shape[1] == 1 else frames.mean(1)), header.rate)
    return Sound(audio[start - first : stop - first].contiguous(), clipped)


def _frames(sound: Any, begin: int, end: int) -> Float[np.ndarray, "frames channels"]:
    """Frames `begin` to `end`."""
    position = begin
    if begin and sound.format == "MP3":
        lead = min(begin, _MP3_LEAD * sound.samplerate)
        with _silence():
            _read_frames(sound, begin - lead, lead)
        position = 0  # the decoder is there
    frames = _read_frames(sound, position, end - begin)
    if len(frames) < end - begin:
        raise CorruptSampleError(
            f"damaged: ends after {(begin + len(frames)) / sound.samplerate:.2f} of {end / sound.samplerate:.2f} s"
        )
    return frames


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stderr: libmpg123 complains there of every frame that needs frames before the position sought."""
    with _ONE_AT_A_TIME, open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _open(stream: BinaryIO) -> Any:
    import soundfile

    try:
        return soundfile.SoundFile(stream)
    except soundfile.SoundFileError as error:
        raise CorruptSampleError(f"not audio in a known format ({_text(error)})") from error


def _read_frames(sound: Any, begin: int, count: int) -> np.ndarray:
    import soundfile

    try:
        if begin:
            sound.seek(begin)
        return sound.read(count, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise CorruptSampleError(f"damaged ({_text(error)})") from error


def _text(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip(" .")[:200] or type(error).__name__


def _check_whole(stream: BinaryIO, head: bytes, size: int) -> None:
    """Complain of a wav that is shorter than it says, and of an ogg without its last page: libsndfile accepts both."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        offset = 12
        while offset + 8 <= size:
            stream.seek(offset)
            name, length = struct.unpack("<4sI", stream.read(8))
            if name == b"data":
                if length not in _UNKNOWN_SIZE and offset + 8 + length > size:
                    raise CorruptSampleError(f"cut off: {size - offset - 8:,} of {length:,} bytes of samples are there")
                return
            offset += 8 + length + length % 2
    if head[:4] == b"OggS":
        stream.seek(max(size - 65_536, 0))
        tail = stream.read(65_536)  # no page is longer than 65,307 bytes
        # In a page, flags are in byte 5 (4: the last page), the number of pieces in byte 26, and their sizes after it.
        page = tail[tail.rfind(b"OggS") :]
        if len(page) < 27 or not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise CorruptSampleError("cut off: the last page of the ogg stream is missing")
