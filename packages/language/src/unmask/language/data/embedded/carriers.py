"""The text sets that come by name. Light on purpose: listing them imports no array library."""

from __future__ import annotations

from unmask.core.data.carriers import Carrier

MOBYDICK = "mobydick"  # in this package: nothing is fetched
_ALL: tuple[Carrier, ...] = ()
CARRIERS: dict[str, Carrier] = {carrier.name: carrier for carrier in _ALL}
NAMES = (MOBYDICK, *CARRIERS)
