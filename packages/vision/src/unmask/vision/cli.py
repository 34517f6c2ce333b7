"""``unmask-vision``: the same commands, where ``mae`` is short for ``vision/mae``."""

from __future__ import annotations

from unmask.core import cli


def main() -> None:
    """Run the command line for this domain."""
    cli.main(domain="vision")


if __name__ == "__main__":
    main()
