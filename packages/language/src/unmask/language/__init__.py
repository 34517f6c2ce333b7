"""Masked prediction for language.

Importing this package is cheap; `load` brings in torch when it is first asked for::

    import unmask.language

    encoder = unmask.language.load("runs/meap")
    features = encoder(encoder.preprocess(["Call me Ishmael.", "It was the best of times."])).pooled
"""

from unmask.core.domain import Domain

__version__ = "0.1.0"
__all__ = ["DOMAIN", "__version__", "load"]

DOMAIN = Domain(
    name="language",
    samples="texts",
    data={
        "texts": "unmask.language.data.texts",
        "chats": "unmask.language.data.chats",
        "tagged_texts": "unmask.language.data.tagged_texts",
        "preferences": "unmask.language.data.preferences",
        "documents": "unmask.language.data.document_pairs",
    },
    tasks={
        "language": "unmask.language.evaluation.language",
        "preference": "unmask.language.evaluation.preference",
        "retrieval": "unmask.language.evaluation.retrieval",
    },
    pretrained="unmask.language.interop.pretrained",
    export="unmask.language.interop.export",
    formats={"transformers": "the whole language model and its tokenizer"},
    report="unmask.language.report.sections",
    sets="unmask.language.data.embedded.carriers",
    checks="unmask.language.checks",
)
load = DOMAIN.load
