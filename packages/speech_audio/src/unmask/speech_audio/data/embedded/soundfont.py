"""Single notes from a SoundFont 2 file: the recordings of real instruments that it holds, at any pitch.

Written from the SoundFont Technical Specification 2.04 (E-mu, 2006): sections 6 and 7 for the file, 8.1 for the
generators, 9.1 for the volume envelope. Enough for labelled notes, and no more: of a preset the zones for the key and
velocity 100 are mixed to mono; filters, low-frequency oscillators, the modulation envelope, panning, reverb and chorus
are left out.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from unmask.core.errors import UnmaskError
from unmask.speech_audio.data.frames import SAMPLE_RATE

VELOCITY = 100
# Generators that are used (section 8.1.2). Those of offsets are in samples, those of envelopes in timecents.
START, END, START_LOOP, END_LOOP = 0, 1, 2, 3
COARSE = {START: 4, END: 12, START_LOOP: 45, END_LOOP: 50}  # the same offsets in steps of 32,768 samples
ATTACK, HOLD, DECAY, SUSTAIN = 34, 35, 36, 37
INSTRUMENT, KEYS, VELOCITIES, ATTENUATION, COARSE_TUNE, FINE_TUNE, SAMPLE, MODE, SCALE, ROOT = (
    41, 43, 44, 48, 51, 52, 53, 54, 56, 58,
)  # fmt: skip
_DEFAULTS = {ATTACK: -12_000, HOLD: -12_000, DECAY: -12_000, SCALE: 100, ROOT: -1}
_NOT_ADDED = (INSTRUMENT, KEYS, VELOCITIES)  # of a preset's generators, which are otherwise added to the instrument's
_RECORDS = {"phdr": "<20sHHHIII", "pbag": "<HH", "pgen": "<Hh", "inst": "<20sH", "ibag": "<HH", "igen": "<Hh"}
_RECORDS["shdr"] = "<20sIIIIIBbHH"
_FADE = SAMPLE_RATE // 200  # 5 ms
_PEAK = 0.9
_DENOMINATOR = 160  # pitches are off by less than a tenth of a cent

Zone = dict[int, int]


@dataclass(frozen=True)
class _Recording:
    """A sample header: where a recording lies, in samples of the file, and what it is a recording of."""

    start: int
    end: int
    start_loop: int
    end_loop: int
    rate: int
    root: int
    correction: int


class SoundFont:
    """A SoundFont in memory.

    Args:
        data: the file's bytes.

    Raises:
        UnmaskError: not a SoundFont, or damaged.
    """

    def __init__(self, data: bytes) -> None:
        try:
            if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
                raise ValueError("no RIFF sfbk header")
            chunks = _chunks(data[12:])
            tables = {name: list(struct.iter_unpack(form, chunks[name])) for name, form in _RECORDS.items()}
            self._wave: Int16[np.ndarray, "n"] = np.frombuffer(chunks["smpl"], "<i2")
        except (ValueError, KeyError, struct.error) as error:
            raise UnmaskError(f"not a SoundFont that can be read ({error})") from error
        self._recordings = [_Recording(*row[1:8]) for row in tables["shdr"]]
        self._instruments = _zones(tables["inst"], tables["ibag"], tables["igen"], 1)
        presets = _zones(tables["phdr"], tables["pbag"], tables["pgen"], 3)
        heads = tables["phdr"][:-1]
        self._presets = {head[1]: zones for head, zones in zip(heads, presets, strict=True) if head[2] == 0}
        names = {head[1]: head[0].split(b"\0")[0] for head in heads if head[2] == 0}
        self.names: dict[int, str] = {program: name.decode("latin-1").strip() for program, name in names.items()}

    def has(self, program: int, key: int) -> bool:
        """Whether a program sounds at this key."""
        return bool(self._matching(program, key))

    def note(self, program: int, key: int, seconds: float = 1.0) -> Float[Tensor, "samples"]:
        """A note held for the whole time, at 16 kHz, its peak at 0.9 and its last 5 ms faded out.

        Args:
            program: 0 to 127, of bank 0.
            key: MIDI number; 60 is middle C.
            seconds: duration.

        Raises:
            UnmaskError: the SoundFont has no such program, or nothing for this key.
        """
        n = round(seconds * SAMPLE_RATE)
        zones = self._matching(program, key)
        if not zones:
            raise UnmaskError(f"the SoundFont has no recording for program {program}, key {key}")
        audio = torch.stack([self._render(zone, key, n) for zone in zones]).sum(0)
        audio[-_FADE:] *= torch.linspace(1, 0, _FADE)
        return audio * (_PEAK / audio.abs().max().clamp(min=1e-6))

    def _matching(self, program: int, key: int) -> list[Zone]:
        """What sounds for a key: instrument zones with the preset's generators added (section 9.4)."""
        zones = []
        for preset in self._presets.get(program, []):
            if INSTRUMENT not in preset or not _covers(preset, key):
                continue
            for zone in self._instruments[preset[INSTRUMENT]]:
                if SAMPLE in zone and _covers(zone, key):
                    added = {g: zone.get(g, _DEFAULTS.get(g, 0)) + v for g, v in preset.items() if g not in _NOT_ADDED}
                    zones.append(zone | added)
        return zones

    def _render(self, zone: Zone, key: int, n: int) -> Float[Tensor, "n"]:
        head = self._recordings[zone[SAMPLE]]
        edges = {START: head.start, END: head.end, START_LOOP: head.start_loop, END_LOOP: head.end_loop}
        start, end, start_loop, end_loop = (
            edge + zone.get(g, 0) + 32_768 * zone.get(COARSE[g], 0) for g, edge in edges.items()
        )
        root = zone.get(ROOT, -1)
        root = head.root if root < 0 else root
        cents = (key - root) * zone.get(SCALE, 100) + 100 * zone.get(COARSE_TUNE, 0)
        cents += zone.get(FINE_TUNE, 0) + head.correction
        step = Fraction(head.rate / SAMPLE_RATE * 2 ** (cents / 1200)).limit_denominator(_DENOMINATOR)
        wanted = math.ceil(n * step) + 64  # samples of the recording, and some for the filter's end
        wave = self._wave[start:end]
        loop = self._wave[start_loop:end_loop]
        if zone.get(MODE, 0) in (1, 3) and len(loop) > 0:  # 3 stops looping when the key is released: it never is
            intro = self._wave[start:end_loop]
            wave = np.concatenate([intro, np.tile(loop, max(math.ceil((wanted - len(intro)) / len(loop)), 0))])
        audio = torch.from_numpy(wave[:wanted].astype(np.float32) / 32768)
        if step != 1:
            from torchaudio.functional import resample

            audio = resample(audio, step.numerator, step.denominator)
        audio = torch.nn.functional.pad(audio[:n], (0, max(n - len(audio), 0)))
        loudness = 10 ** (-zone.get(ATTENUATION, 0) / 200)
        return audio * _envelope(zone, n) * loudness


def _chunks(data: bytes) -> dict[str, bytes]:
    """The chunks of a RIFF by name, those inside lists among them."""
    chunks: dict[str, bytes] = {}
    offset = 0
    while offset + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, offset)
        content = data[offset + 8 : offset + 8 + size]
        chunks |= _chunks(content[4:]) if name == b"LIST" else {name.decode("ascii", "replace"): content}
        offset += 8 + size + size % 2
    return chunks


def _zones(heads: list[Any], bags: list[Any], generators: list[Any], column: int) -> list[list[Zone]]:
    """For each preset or instrument its zones as {generator: value}, with the global zone's values filled in.

    `column` of a head says where its bags start; the last head only ends the one before.
    """
    result = []
    for head, after in zip(heads[:-1], heads[1:], strict=True):
        zones = [dict(generators[bags[b][0] : bags[b + 1][0]]) for b in range(head[column], after[column])]
        ends = (INSTRUMENT, SAMPLE)
        shared = zones[0] if zones and not any(g in zones[0] for g in ends) else {}
        result.append([shared | zone for zone in zones if any(g in zone for g in ends)])
    return result


def _covers(zone: Zone, key: int) -> bool:
    """Whether the zone's ranges (low byte: least, high byte: largest) hold this key and our velocity."""
    ranges = ((zone.get(KEYS, 0x7F00), key), (zone.get(VELOCITIES, 0x7F00), VELOCITY))
    return all(span & 255 <= value <= span >> 8 for span, value in ranges)


def _envelope(zone: Zone, n: int) -> Float[Tensor, "n"]:
    """The volume envelope of a held key: a linear attack, a hold, and a decay that is linear in decibels."""
    attack, hold, decay = (2 ** (zone.get(g, -12_000) / 1200) for g in (ATTACK, HOLD, DECAY))  # seconds
    time = torch.arange(n) / SAMPLE_RATE
    # A decay is the time that 100 dB take; a sustain level is given in tenths of a decibel.
    fall = ((time - attack - hold) / decay * 100).clamp(0, min(max(zone.get(SUSTAIN, 0), 0) / 10, 100))
    return (time / attack).clamp(max=1) * 10 ** (-fall / 20)
