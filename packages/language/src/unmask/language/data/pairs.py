"""Pairs of responses: records to the texts of a prompt, a chosen and a rejected response."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

from unmask.core.errors import Problem
from unmask.core.randomness import stable_id
from unmask.language.data.documents import RECORDS, Document
from unmask.language.data.sources import Files
from unmask.language.data.vocabulary import Tokenizer, TokenizerError

FIELDS = ("prompt", "chosen", "rejected")
_PROMPT_WORDS, _RESPONSE_WORDS, _FEWEST = 16, 16, 8  # of a pair that is made of plain text


def read_pairs(files: Files, index: int, template: Tokenizer | None = None) -> Iterator[Document | Problem]:
    """The pairs of one file, as documents of three parts, and what is wrong with those that cannot be used.

    Args:
        files: where they are.
        index: of the file.
        template: the tokenizer whose chat template writes conversations as text, where the pairs are conversations.
    """
    name = files.names[index]
    if not name.endswith(RECORDS):
        passages = (d for d in files.documents(index, piece=400) if isinstance(d, Document))
        for number, parts in enumerate((p for d in passages for p in made_pairs(d.parts[0], d.name)), start=1):
            yield Document(f"{name}:{number}", parts)
        return
    for item in files.documents(index, text_field=None):
        yield item if isinstance(item, Problem) else _pair(item, template)


def made_pairs(passage: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Synthetic pairs from plain text, for trying things out: words in their order are preferred to shuffled ones.

    A passage's words are the prompt and the chosen response in turn; the rejected response has the words of the chosen
    one in another order.

    Args:
        passage: some prose.
        name: decides the orders.
    """
    words = passage.split()
    for start in range(0, len(words), _PROMPT_WORDS + _RESPONSE_WORDS):
        prompt = words[start : start + _PROMPT_WORDS]
        chosen = words[start + _PROMPT_WORDS : start + _PROMPT_WORDS + _RESPONSE_WORDS]
        if len(chosen) < _FEWEST:
            continue
        shuffled = random.Random(stable_id(f"{name}@{start}")).sample(chosen, len(chosen))
        if shuffled != chosen:
            yield " ".join(prompt), " " + " ".join(chosen), " " + " ".join(shuffled)


NO_TEMPLATE = (
    "the pairs are conversations (lists of messages), and the tokenizer has no chat template to write them as text. "
    "Give a chat model's tokenizer with --set data.tokenizer=DIR, or prompt, chosen and rejected as text"
)


def are_conversations(files: Files) -> bool:
    """Whether the first record that has all fields holds lists of messages, not texts: one source holds one of both."""
    for index, name in enumerate(files.names):
        for item in files.documents(index, text_field=None) if name.endswith(RECORDS) else ():
            if isinstance(item, Document) and all(field in item.fields for field in FIELDS):
                return isinstance(item.fields[FIELDS[1]], list)
    return False


def _pair(record: Document, template: Tokenizer | None) -> Document | Problem:
    values = [record.fields.get(field) for field in FIELDS]
    missing = [field for field in FIELDS if field not in record.fields]
    if missing:
        there = ", ".join(map(str, record.fields)) or "none"
        return Problem(record.name, f"no {' and no '.join(missing)}; fields there: {there}. Rename those of your data")
    kind = str if template is None else list
    for field, value in zip(FIELDS, values, strict=True):
        if not isinstance(value, kind):
            wanted = "text, as in the first record" if kind is str else "a list of messages, as in the first record"
            return Problem(record.name, f"{field} is {_what(value)}; expected {wanted}")
        if not value or (isinstance(value, str) and not value.strip()):
            return Problem(record.name, f"{field} is empty")
    if template is not None:
        return _conversation(record.name, values, template)
    return _different(Document(record.name, tuple(map(str, values))))


def _what(value: Any) -> str:
    names = {"NoneType": "null", "str": "text", "list": "a list"}
    return names.get(type(value).__name__, f"of type {type(value).__name__}")


def _different(document: Document) -> Document | Problem:
    _, chosen, rejected = document.parts
    return document if chosen != rejected else Problem(document.name, "chosen and rejected are the same")


def _conversation(name: str, values: list[Any], template: Tokenizer) -> Document | Problem:
    for field, messages in zip(FIELDS, values, strict=True):
        if wrong := next(filter(None, (_wrong(message, template) for message in messages)), ""):
            return Problem(name, f"{field}: {wrong}")
    prompt, *responses = values
    try:
        before = _render(template, prompt, True)
        whole = [_render(template, [*prompt, *response], False) for response in responses]
    except TokenizerError:
        raise
    except Exception as error:  # a template is a program, which refuses what it does not know in its own way
        return Problem(name, f"the tokenizer's chat template refuses it ({' '.join(str(error).split())[:120]})")
    common = os.path.commonprefix([before, *whole])  # a template may end a prompt otherwise than it goes on
    if not common.strip():
        return Problem(name, "the chat template leaves nothing of the prompt before the responses")
    return _different(Document(name, (common, *(text[len(common) :] for text in whole))))


def _wrong(message: Any, template: Tokenizer) -> str:
    """What is wrong with a message; empty where nothing is."""
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
        return "expected messages of role and content, both text"
    if not message["content"].strip():
        return "a message is empty"
    special = [token for token in template.fast.all_special_tokens if token in message["content"]]
    return f"a message holds {special[0]!r}, which would be read as a special token" if special else ""


def _render(template: Tokenizer, messages: list[Any], goes_on: bool) -> str:
    if not getattr(template.fast, "chat_template", None):
        raise TokenizerError(NO_TEMPLATE)
    return str(template.fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=goes_on))
