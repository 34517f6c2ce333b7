"""A run as one HTML page that stands alone: curves, pictures, probes, settings, and how to go on."""

from unmask.core.report.page import write_report
from unmask.core.report.reference import Reference, make_reference

__all__ = ["Reference", "make_reference", "write_report"]
