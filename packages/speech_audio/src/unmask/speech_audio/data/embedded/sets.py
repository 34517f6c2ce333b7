"""The embedded sets of sound: decoded once from their carriers, split once, kept in the cache as 16-bit samples.

===========  =====  =========================  ==========================================================
set          clips  labels                     no two splits share
===========  =====  =========================  ==========================================================
notes        2,682  family, instrument, pitch  a note (each is there once); every instrument is in each
syllables    2,358  tone, initial, speaker     a syllable: both speakers' recordings of it stay together
prompts      2,755  language, speaker          a prompt: its recordings in all five languages stay together
===========  =====  =========================  ==========================================================

Splits are the same for every run and written beside the audio before anything is trained: about 70 % for training, 10 %
to choose on and 20 % to report on (80, 10 and 10 for prompts), by instrument for notes and by initial for syllables.
Clips of train or val whose samples equal those of one in val or test are left out. There are too few speakers (2 and 5)
for splits without shared ones, so what is reported on these sets is about unseen notes and words of known voices.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from unmask.core.data.carriers import Archive, Carrier, cache_dir, fetch, say
from unmask.core.data.kinds import CorruptSampleError
from unmask.core.data.splits import assign, drop_duplicates
from unmask.core.data.stored import Ragged, stored
from unmask.core.progress import progress_bar
from unmask.core.randomness import stable_id
from unmask.speech_audio.data.decode import Sound, examine, read
from unmask.speech_audio.data.embedded.carriers import CARRIERS, LANGUAGES
from unmask.speech_audio.data.embedded.soundfont import SoundFont

_FORMAT = 2  # raise when the decoding or the splits change, so that old cache entries are not used
_SCALE = 32768
EMBEDDED = ("notes", "syllables", "prompts")
FAMILIES = (
    "piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe",
    "synth lead", "synth pad", "synth effects", "ethnic",
)  # fmt: skip
PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_LOWEST = 36


@dataclass(frozen=True)
class Clip:
    """A decoded clip, before it is split.

    Args:
        name: within its set.
        audio: 16 kHz mono.
        labels: its classes by what they say.
        group: clips of one group stay in one split; empty for a group of its own.
        stratum: groups of one stratum are shared out among the splits evenly.
        text: what is said, where that is known.
    """

    name: str
    audio: torch.Tensor
    labels: dict[str, str] = field(default_factory=dict)
    group: str = ""
    stratum: str = ""
    text: str | None = None


@dataclass(frozen=True)
class Clips16:
    """An embedded set in the cache.

    Args:
        audio: the clips' samples, in 16 bits.
        names: one per clip, ``set:name``.
        codes: the split of each clip; see `unmask.core.data.splits`.
        labels: class names by what they say; None where unknown.
        texts: what is said, or None.
    """

    audio: Ragged
    names: list[str]
    codes: Int8[Tensor, "clips"]
    labels: dict[str, list[str | None]]
    texts: list[str | None]

    def __call__(self, index: int, start: int, stop: int) -> Sound:
        """Samples `start` to `stop` of a clip."""
        part = self.audio.rows(index, start, stop)["audio"]
        return Sound(torch.from_numpy(part.astype(np.float32) / _SCALE))


def load(name: str) -> Clips16:
    """An embedded set; fetched and decoded on first use, then served from the cache.

    Raises:
        CarrierError: it cannot be fetched, or its archive is not what was published.
    """
    carriers = [carrier for carrier in CARRIERS.values() if name in (carrier.name, carrier.part_of)]
    stamp = hashlib.blake2b("|".join(carrier.key for carrier in carriers).encode(), digest_size=8).hexdigest()
    cached = cache_dir() / "audio" / f"{name}-{stamp}-v{_FORMAT}"
    about = stored(cached, lambda folder: _build(name, carriers, folder))
    codes = torch.from_numpy(np.load(cached / "splits.npy"))
    return Clips16(Ragged(cached, ("audio",)), about["names"], codes, about["labels"], about["texts"])


def _build(name: str, carriers: list[Carrier], folder: Path) -> dict[str, Any]:
    archives = {carrier.name: fetch(carrier) for carrier in carriers}
    say(f"{name}: decoding once")
    decode, size, val_share, test_share = _DECODERS[name]
    clips, pieces = [], []
    with progress_bar(f"decoding {name}", size) as advance:
        for clip in decode(archives):
            pieces.append((clip.audio * _SCALE).round().clamp(-_SCALE, _SCALE - 1).to(torch.int16).numpy())
            clips.append(clip)
            advance(1)
    codes, dropped = drop_duplicates(pieces, _split(clips, val_share, test_share))
    Ragged.write(folder, audio=pieces)
    np.save(folder / "splits.npy", codes.numpy())
    return {
        "names": [f"{name}:{clip.name}" for clip in clips],
        "labels": {key: [clip.labels.get(key) for clip in clips] for key in clips[0].labels},
        "texts": [clip.text for clip in clips],
        "dropped": dropped,
    }


def _split(clips: list[Clip], val_share: float, test_share: float) -> Int8[Tensor, "clips"]:
    """Split codes: whole groups, each stratum alike."""
    groups = [clip.group or clip.name for clip in clips]
    stratum = dict(zip(groups, (clip.stratum for clip in clips), strict=True))
    strata = sorted(set(stratum.values()))
    ids = torch.tensor([stable_id(group) for group in stratum])
    codes = assign(ids, torch.tensor([strata.index(s) for s in stratum.values()]), None, val_share, test_share)
    of_group = dict(zip(stratum, codes.tolist(), strict=True))
    return torch.tensor([of_group[group] for group in groups], dtype=torch.int8)


def note_keys() -> list[int]:
    """The 24 MIDI keys of `notes`, 36 to 83: each pitch class in two of the four octaves, six in each octave."""
    pairs = list(combinations(range(4), 2))
    return sorted(_LOWEST + 12 * octave + c for c in range(12) for octave in pairs[c % 6])


def _decode_notes(archives: dict[str, Path]) -> Iterator[Clip]:
    with Archive(archives["notes"]) as archive:
        font = SoundFont(archive.read("pretty_midi/TimGM6mb.sf2"))
    for program in range(8 * len(FAMILIES)):  # what follows, percussion and sound effects, has no pitch
        instrument = f"{program + 1} {font.names[program]}"
        for key in filter(partial(font.has, program), note_keys()):
            labels = {"family": FAMILIES[program // 8], "instrument": instrument, "pitch": PITCHES[key % 12]}
            yield Clip(f"{program}/{key}", font.note(program, key), labels, stratum=instrument)


def _decode_syllables(archives: dict[str, Path]) -> Iterator[Clip]:
    with Archive(archives["syllables"]) as archive:
        for path in archive.names():
            if not path.endswith(".ogg"):
                continue
            syllable, speaker = path.removesuffix(".ogg").split("/")[-2:]
            # No digit is the first tone; 1 is the neutral tone of a dozen particles, too few for a class.
            tone = {"2": "2", "3": "3", "4": "4", "1": None}.get(syllable[-1], "1")
            labels = {"tone": tone, "initial": syllable[0], "speaker": speaker}
            known = {key: value for key, value in labels.items() if value is not None}
            audio = _decode(archive.read(path))
            yield Clip(f"{syllable}/{speaker}", audio, known, syllable, syllable[0], syllable)


def _decode_prompts(archives: dict[str, Path]) -> Iterator[Clip]:
    texts = {code: _prompt_texts(archives[f"prompts-{code}-text"], code) for code in LANGUAGES}
    tones = {name for known in texts.values() for name, text in known.items() if re.fullmatch(r"\[[^\]]*\]", text)}
    for code, language in LANGUAGES.items():
        with Archive(archives[f"prompts-{code}"]) as archive:
            for path in archive.names():
                if not path.endswith(".wav"):
                    continue
                name = path.split("/sounds/")[1].split("/", 1)[1].removesuffix(".wav")
                if name.startswith("silence/") or name in tones:
                    continue
                labels = {"language": language, "speaker": language}
                try:
                    audio = _decode(archive.read(path))
                except CorruptSampleError as error:  # one Russian prompt has a header and no samples
                    say(f"prompts: {code}/{name} is left out: {error}")
                    continue
                yield Clip(f"{code}/{name}", audio, labels, name, text=texts[code].get(name))


def _prompt_texts(path: Path, code: str) -> dict[str, str]:
    """What each prompt says; in square brackets where it is no speech."""
    with Archive(path) as archive:
        table = next(name for name in archive.names() if name.endswith(f"core-sounds-{code}.txt.gz"))
        lines = gzip.decompress(archive.read(table)).decode("utf-8-sig", "replace").splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith(";")]
    return {name.strip(): text.strip() for name, text in pairs}


def _decode(data: bytes) -> Tensor:
    return read(io.BytesIO(data), examine(io.BytesIO(data))).audio


_DECODERS = {  # with the number of clips, and the shares of val and test
    "notes": (_decode_notes, 2682, 0.1, 0.2),
    "syllables": (_decode_syllables, 2358, 0.1, 0.2),
    "prompts": (_decode_prompts, 2755, 0.1, 0.1),
}
