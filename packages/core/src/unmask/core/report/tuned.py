"""The report of a fine-tuning: its accuracy where other runs have probes, and what to do with a classifier.

It takes the place of the domain's report module (`unmask.core.domain.Report`), which shows masks and reconstructions.
"""

from __future__ import annotations

from unmask.core.report.gather import RunFacts
from unmask.core.report.parts import Pictures, Probes, Rows, Section, Verdict

COMMANDS = (
    ("Classify samples of yours", "unmask predict {run} FOLDER --out predictions.parquet"),
    ("Start another training from its encoder", "unmask train METHOD --init {run} --out OUT"),
)


def draw_pictures(run: RunFacts) -> Pictures:
    """None: a classifier hides nothing."""
    return Pictures()


def probes(run: RunFacts) -> Probes:
    """The accuracy of each split that has been scored."""
    found, names = run.tuned or {}, {"test": "accuracy", "validation": "val_accuracy"}
    scores = {split: found[key] for split, key in names.items() if key in found}
    if not scores and (value := run.last("val_accuracy")) is not None:
        scores = {"validation": value}
    rows: Rows = [(split, [(f"{100 * value:.1f} %", False)]) for split, value in scores.items()]
    return Probes(["accuracy"], rows, _verdict(run), "", corner="split")


def _verdict(run: RunFacts) -> Verdict:
    classes = len(run.recipe["finetune"]["classes"])
    if run.tuned is None:
        return Verdict("The test split is scored when the fine-tuning has finished.", "plain")
    began = "random weights" if run.tuned["scratch"] else f"the encoder of {run.tuned['run']}"
    count = run.tuned["splits"]["test"]
    return Verdict(
        f"The classifier, which began with {began}, is right on {run.tuned['accuracy']:.1%} of {count:,} test samples "
        f"of {classes} classes. Compare with the same from random weights: unmask finetune --scratch.",
        "plain",
    )


def sections(run: RunFacts) -> list[Section]:
    """None beside those of every run."""
    return []
