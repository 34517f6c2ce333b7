"""The public sets of speech and sound that unmask can fetch. Listing them imports no array library."""

from __future__ import annotations

from unmask.core.data.carriers import Carrier

LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
_PACKAGE = "asterisk-core-sounds"
_PROMPT_SIZES = {"en": 18_272_864, "es": 23_767_256, "fr": 18_516_060, "it": 18_262_124, "ru": 18_788_860}
_TEXT_SIZES = {"en": 22_844, "es": 22_012, "fr": 23_152, "it": 23_972, "ru": 25_592}


def _prompts(code: str) -> list[Carrier]:
    """The archive of one language's recordings, and the one with their texts."""
    archives = {"": (f"{_PACKAGE}-{code}-wav", _PROMPT_SIZES), "-text": (f"{_PACKAGE}-{code}", _TEXT_SIZES)}
    return [
        Carrier(
            name=f"prompts-{code}{suffix}",
            registry="apt",
            package=package,
            version="",
            digest="",
            size=sizes[code],
            licence="CC BY 3.0 (Maxim Topal)" if code == "ru" else "CC BY-SA 3.0",
            source="the sounds of the Asterisk telephone exchange (Digium, Inc.), as packaged by Debian",
            holds="2,755 telephone prompts in 5 languages, 125 minutes, with texts: language",
            part_of="prompts",
        )
        for suffix, (package, sizes) in archives.items()
    ]


_ALL = (
    Carrier(
        name="notes",
        registry="pip",
        package="pretty-midi",
        version="0.2.11.post0",
        digest="sha256:a3e2321736245a9c92259716d85a4762f16b7bde2f591fb0dba95bdb6e793d8a",
        size=5_597_222,
        licence="SoundFont GPL-2.0; package MIT",
        source="TimGM6mb (Tim Brechbill), recorded instruments for MIDI, as packaged by pretty_midi",
        holds="2,682 notes of 112 instruments, 1 s each: family, instrument, pitch",
    ),
    Carrier(
        name="syllables",
        registry="apt",
        package="gcin-voice",
        version="",
        digest="",
        size=7_740_240,
        licence="speaker 3: LGPL-3 or GPL-3; speaker 5: CC BY 3.0",
        source="gcin-voice (Edward Der-Hua Liu; ChionMeilin and Chu Lo), as packaged by Debian",
        holds="2,358 Mandarin syllables of 2 speakers, 14 minutes: tone, initial, speaker",
    ),
    *(carrier for code in LANGUAGES for carrier in _prompts(code)),
)
CARRIERS: dict[str, Carrier] = {carrier.name: carrier for carrier in _ALL}
