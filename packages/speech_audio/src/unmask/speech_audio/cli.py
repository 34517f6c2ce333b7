"""``unmask-speech-audio``: the same commands, where ``hubert`` is short for ``speech_audio/hubert``."""

from __future__ import annotations

from unmask.core import cli


def main() -> None:
    """Run the command line for this domain."""
    cli.main(domain="speech_audio")


if __name__ == "__main__":
    main()
