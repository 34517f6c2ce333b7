"""``unmask report``."""

from __future__ import annotations

from unmask.core.cli.options import Run, method_of

EXAMPLES = ("unmask report runs/first",)


def report(run: Run) -> None:
    """Write RUN/report.html: settings, curves, pictures of masks and reconstructions, and the evaluation.

    The page stands alone in one file. It works on a run that is still training, too.
    """
    from unmask.core.report import write_report

    method_of(run)
    print(write_report(run))
