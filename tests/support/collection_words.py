"""Collections to count words of: random ones, and the one that the numbers of PROP's authors are of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from unmask.language.data.document_model import DocumentModel

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "prop.safetensors")
FACTS: dict[str, Any] = json.loads((FOLDER / "prop.json").read_text(encoding="utf-8"))
STOP = frozenset(["the", "of", "and", "in", "is", "that", "with", "about", "s"])
TEXTS = [f"{document['title']} {document['text']}" for document in FACTS["documents"]]


PIECES: list[str] = FACTS["vocabulary"]


def some_texts(documents: int = 60) -> list[str]:
    generator = random.Random(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdgk" for b in "aeio" for c in "lmnr"]
    return [" ".join(generator.choices(vocabulary, k=generator.randint(5, 80))) for _ in range(documents)]


def aligned(model: DocumentModel, values: np.ndarray) -> np.ndarray:
    """Values of known words in the order of the record, NaN for others."""
    found = [model.index.get(word) for word in FACTS["words"]]
    return np.array([np.nan if i is None else values[i] for i in found])


def word_piece(folder: Path) -> str:
    """A BERT tokenizer with the record's vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return str(folder)


def records(folder: Path, name: str = "news.jsonl", title: str = "title") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"_id": d["id"], title: d["title"], "text": d["text"]} for d in FACTS["documents"]]
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder
