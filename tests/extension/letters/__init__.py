"""Masked modelling of short lines of text, letter by letter: a whole domain, as small as one can be."""

from unmask.core.domain import Domain

DOMAIN = Domain(
    name="letters",
    samples="lines",
    data={"lines": "unmask.letters.data.lines", "pairs": "unmask.letters.data.pairs"},
    tasks={"representation": "unmask.letters.evaluation.representation"},
    checks="unmask.letters.checks",
)
load = DOMAIN.load
