"""Documents in files: plain text, JSON lines and parquet, read one after another in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from unmask.core.data.folders import suffix
from unmask.core.data.kinds import CorruptSampleError, Kind
from unmask.core.errors import Problem

Unit = Literal["file", "line"]
PLAIN = (".txt", ".text", ".md", ".train", ".dev", ".test")  # the last three are BabyLM's: one file a source and split
RECORDS = (".jsonl", ".parquet")


def examine(file: BinaryIO, name: str) -> dict[str, Any]:
    """See that a file is not empty."""
    if not file.read(1):
        raise CorruptSampleError("empty file")
    return {}


TEXTS = Kind(
    "text",
    PLAIN + RECORDS,
    examine,
    expected="Give a folder of .txt, .jsonl or .parquet files, one such file, or an embedded set (unmask data list).",
)


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        name: its file's name and, where a file holds several, a number: ``novel.txt:3``, ``news.jsonl:17``.
        parts: its texts: one of plain text, a prompt and an answer of a chat.
        fields: what else its record holds; empty for plain text.
    """

    name: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_documents(
    path: Path, name: str, *, unit: Unit = "file", piece: int = 4000, text_field: str | None = "text"
) -> Iterator[Document | Problem]:
    """The documents of one file, in order, and what is wrong with those that cannot be used.

    Args:
        path: the file.
        name: what to call it.
        unit: of plain text, what is one document: the file, or every line.
        piece: characters; a plain file that is longer is cut at blank lines (else at line ends) into pieces about as
            long, so that one book can be split into training and validation.
        text_field: of records, the field with the text; None where a record has no such field of its own.
    """
    if suffix(name) in RECORDS:
        yield from _records(path, name, text_field)
        return
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            parts: Iterable[str] = (line.rstrip("\n") for line in file) if unit == "line" else _pieces(file, piece)
            for number, text in enumerate(parts, start=1):
                yield from _checked(Document(f"{name}:{number}", (text,)), unit == "line")
        except UnicodeDecodeError as error:
            yield Problem(name, f"not UTF-8 from byte {error.start} on: convert it, for example with iconv -t UTF-8")


def _checked(document: Document, blank_is_fine: bool) -> Iterator[Document | Problem]:
    if document.parts[0].strip():
        yield document
    elif not blank_is_fine:
        yield Problem(document.name, "empty text")


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Text in pieces of at least `size` characters, cut at blank lines; at a line's end from twice that on."""
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line)
        length += len(line)
        if (length >= size and not line.strip()) or length >= 2 * size:
            yield "".join(held)
            held, length = [], 0
    if length:
        yield "".join(held)


def _records(path: Path, name: str, text_field: str | None) -> Iterator[Document | Problem]:
    rows = _parquet(path, name) if suffix(name) == ".parquet" else _json_lines(path)
    for number, row in enumerate(rows, start=1):
        label = f"{name}:{number}"
        if isinstance(row, str):
            yield Problem(name if row.startswith("not parquet") else label, row)
        elif text_field is None:
            yield Document(label, (), row)
        elif not isinstance(row.get(text_field), str):
            there = ", ".join(map(str, row)) or "none"
            yield Problem(label, f"no text in the field {text_field!r}; fields there: {there}. Set data.text_field")
        else:
            yield from _checked(Document(label, (row[text_field],), row), blank_is_fine=False)


def _json_lines(path: Path) -> Iterator[dict[str, Any] | str]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield f"not JSON ({error})"
                continue
            yield row if isinstance(row, dict) else f"expected a JSON object, got {type(row).__name__}"


def _parquet(path: Path, name: str) -> Iterator[dict[str, Any] | str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        yield f"not parquet, or damaged ({' '.join(str(error).split())[:120]})"
