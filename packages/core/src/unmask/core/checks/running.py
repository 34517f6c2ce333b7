"""Running a suite: every check on a case of its own, and all failures reported at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from unmask.core.errors import UnmaskError

Check = Callable[[Any], None]


def run_checks(checks: Sequence[Check], case: Callable[[], Any], who: str, skip: Collection[str] = ()) -> None:
    """Run checks, each on a new case that `case` makes.

    Raises:
        AssertionError: lists every check that failed, and how.
    """
    chosen = [check for check in checks if check.__name__ not in skip]
    failures = [failure for check in chosen if (failure := _failure(check, case()))]
    if failures:
        head = f"{who} fails {len(failures)} of {len(chosen)} checks:"
        raise AssertionError("\n  - ".join([head, *failures]))


def _failure(check: Check, case: Any) -> str | None:
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            check(case)
    except (AssertionError, UnmaskError) as error:
        return f"{check.__name__}: {error}"
    except Exception as error:  # whatever a broken method raises is a finding, and the other checks still run
        return f"{check.__name__}: raised {type(error).__name__}: {error}"
    return None
