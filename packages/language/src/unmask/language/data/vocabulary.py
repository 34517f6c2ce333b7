"""Tokenizers: opened from a directory, or trained on the data; and the token ids that methods have to know."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from unmask.core.errors import UnmaskError
from unmask.core.networks import network_folder

_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[BOS]", "eos": "[EOS]", "mask": "[MASK]"}
_SPACES = ("\u0120", "\u010a", "\u0109", "\u2581")  # byte-level space, line end and tab; SentencePiece's space


class TokenizerError(UnmaskError):
    """A tokenizer that cannot be opened or trained."""


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that methods have to know.

    Args:
        size: number of ids, the mask token's included.
        mask: replaces what is hidden. Where the tokenizer has none it is the first id after its own.
        bos: begins a document (a masked language model's ``[CLS]``); None where there is none.
        eos: ends a document (``[SEP]``).
        pad: fills up.
        unknown: stands for what the tokenizer does not know; None where there is none.
        special: every special id, in order: never hidden where a method leaves special tokens alone.
        digest: of the tokenizer, so that a resumed run notices another.
    """

    size: int
    mask: int
    bos: int | None
    eos: int
    pad: int
    unknown: int | None
    special: tuple[int, ...]
    digest: str


class Tokenizer:
    """Text to ids and back. What reads like a special token in a text is text: it never becomes the special id.

    Args:
        fast: a tokenizer of transformers that runs on the tokenizers library.
        source: where it came from, for messages.
    """

    def __init__(self, fast: Any, source: str) -> None:
        self.fast = fast
        self.backend = fast.backend_tokenizer
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocabulary = _vocabulary(fast, source)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are shown, the mask token as ``[MASK]``."""
        own, parts, run = len(self.fast), [], []
        for token in ids:
            if token < own:
                run.append(int(token))
                continue
            parts += [self.backend.decode(run, skip_special_tokens=False), _SPECIAL["mask"]]
            run = []
        return "".join([*parts, self.backend.decode(run, skip_special_tokens=False)])

    def save(self, folder: Path) -> None:
        """Write it as transformers reads it."""
        self.fast.save_pretrained(folder)


def _vocabulary(fast: Any, source: str) -> Vocabulary:
    size = len(fast)
    bos = fast.bos_token_id if fast.bos_token_id is not None else fast.cls_token_id
    eos = fast.eos_token_id if fast.eos_token_id is not None else fast.sep_token_id
    if eos is None:
        raise TokenizerError(f"{source}: the tokenizer has neither an end-of-text nor a separator token to end a text")
    mask = size if fast.mask_token_id is None else fast.mask_token_id
    pad = eos if fast.pad_token_id is None else fast.pad_token_id
    special = tuple(sorted({*fast.all_special_ids, mask}))
    digest = hashlib.blake2b(fast.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()
    return Vocabulary(max(size, mask + 1), mask, bos, eos, pad, fast.unk_token_id, special, digest)


@lru_cache(maxsize=4)
def open_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a directory or hub id, as transformers saves it; no code that lies beside it is run.

    Raises:
        TokenizerError: there is none, or none that the tokenizers library can run.
    """
    from transformers import AutoTokenizer

    folder = network_folder(source)
    try:
        fast = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers raises a dozen kinds here; all mean "not readable"
        raise TokenizerError(
            f"{source}: no tokenizer can be opened there ({' '.join(str(error).split())[:200]}). Give the directory of "
            "one with --set data.tokenizer=DIR; transformers writes it with tokenizer.save_pretrained(DIR)"
        ) from None
    if not getattr(fast, "is_fast", False):
        raise TokenizerError(
            f"{source}: {type(fast).__name__} is not one of the tokenizers library (it has no tokenizer.json); convert "
            "it with transformers and save it again: AutoTokenizer.from_pretrained(DIR, use_fast=True)"
        )
    return Tokenizer(fast, source)


def train_tokenizer(texts: Iterable[str], size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer (Sennrich et al., ACL 2016; Radford et al., 2019) and save it in `folder`.

    Five special tokens come first, then the 256 bytes, then pieces in the order they were merged, so that a low id is a
    frequent piece. Every text can be encoded: nothing is unknown.

    Args:
        texts: what to learn from.
        size: ids at most, the special ones included.
        folder: where to write; transformers opens it.

    Raises:
        TokenizerError: `size` has no room for bytes and special tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(_SPECIAL):
        raise TokenizerError(
            f"data.vocabulary_size: {size} has no room for {len(alphabet)} bytes and {len(_SPECIAL)} special tokens; "
            f"give {len(alphabet) + len(_SPECIAL)} or more"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = Backend(models.BPE(unk_token=_SPECIAL["unk"]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_SPECIAL.values()), initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokens = {f"{name}_token": token for name, token in _SPECIAL.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)


def known(vocabulary: Vocabulary | None) -> Vocabulary:
    """The vocabulary that data settings were filled in with.

    Raises:
        RuntimeError: the data have not been opened yet. A recipe is checked before that, and its model is then built
            when they are.
    """
    if vocabulary is None:
        raise RuntimeError("data.vocabulary is filled in when the data are opened")
    return vocabulary


def begins_word(tokenizer: Tokenizer) -> Bool[np.ndarray, "vocabulary"]:
    """Which ids begin a word, so that the others go on with the word before.

    Of WordPiece those are the pieces without ``##``, elsewhere the pieces that begin with white space. Where pieces say
    neither, every piece is a word.
    """
    pieces = tokenizer.fast.convert_ids_to_tokens(list(range(len(tokenizer.fast))))
    goes_on = np.array([piece.startswith("##") for piece in pieces])
    spaced = np.array([piece[:1] in _SPACES for piece in pieces])
    begins = ~goes_on if goes_on.any() else spaced if spaced.any() else np.ones(len(pieces), dtype=bool)
    begins[[i for i in tokenizer.vocabulary.special if i < len(pieces)]] = True
    return np.concatenate([begins, np.ones(tokenizer.vocabulary.size - len(pieces), dtype=bool)])
