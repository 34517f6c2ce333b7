"""``unmask-pointcloud``: the same commands, where ``geomae`` is short for ``pointcloud/geomae``."""

from __future__ import annotations

from unmask.core import cli


def main() -> None:
    """Run the command line for this domain."""
    cli.main(domain="pointcloud")


if __name__ == "__main__":
    main()
