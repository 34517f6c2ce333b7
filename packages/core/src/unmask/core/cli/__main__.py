"""``python -m unmask.core.cli``."""

from unmask.core.cli import main

main()
