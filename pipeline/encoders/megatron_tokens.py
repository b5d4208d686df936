"""The tokenizers of the reference's models: sentencepiece for proteins, a regular expression for SMILES."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from pipeline.errors import CheckpointError

UNKNOWN = "?"  # the token of SMILES that stands for all others
PADDING = 0  # in SMILES, whatever the vocabulary says


class MegatronTokens(Protocol):
    """How sequences become token ids.

    Attributes:
        size: ids are below it.
        before: ids of the special tokens in front of a sequence.
        after: ids of the special tokens behind it.
        padding: the id to pad with.
        digest: changes when an id may change.
        content: what `read_tokens` makes it from, as JSON has it.
    """

    size: int
    before: Sequence[int]
    after: Sequence[int]
    padding: int
    digest: str
    content: Mapping[str, Any]

    def ids(self, sequence: str) -> list[int]:
        """The ids of a sequence, as the reference has them, special tokens left out."""
        ...

    def token_of_character(self, sequence: str) -> list[int] | None:
        """For each character, which of the tokens stands for it; None where that cannot be said."""
        ...

    def count_unknown(self, sequence: str) -> tuple[int, int]:
        """How much of a sequence is unknown, and how much of it there is."""
        ...


class ProteinTokens(MegatronTokens):
    """A sentencepiece model, with `<s>` and `</s>` around the sequence or not.

    Sentencepiece makes one `<unk>` of a run of unknown characters, and the reference embeds that. So does this; each
    character of the run then has the same token.
    """

    def __init__(self, content: bytes, around: bool) -> None:
        """Reads a serialized sentencepiece model. Raises CheckpointError if it is none, or lacks a special token."""
        from sentencepiece import SentencePieceProcessor

        if not content:
            raise CheckpointError("expected a sentencepiece model, found an empty file")
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except Exception as error:  # whatever the library raises
            raise CheckpointError(f"expected a sentencepiece model, found none ({error})") from error
        self.size = self._model.get_piece_size()
        self._unknown = self._model.unk_id()
        if around and min(self._model.bos_id(), self._model.eos_id()) < 0:
            raise CheckpointError("expected a sentencepiece model with <s> and </s>, found one without")
        self.before = [self._model.bos_id()] if around else []
        self.after = [self._model.eos_id()] if around else []
        self.padding = max(self._model.pad_id(), 0)
        self.content = {"sentencepiece": content.hex(), "around": around}
        self.digest = f"sentencepiece {hashlib.sha256(content).hexdigest()} {self.before} {self.after}"
        self._of_character = cache(self._character)

    def ids(self, sequence: str) -> list[int]:
        """See `MegatronTokens`."""
        return list(self._model.encode(sequence))

    def token_of_character(self, sequence: str) -> list[int] | None:
        """See `MegatronTokens`; None where tokens are not characters, as with blanks at an end."""
        tokens: list[int] = []
        places = []
        for token in map(self._of_character, sequence):
            if not tokens or token != self._unknown or tokens[-1] != self._unknown:
                tokens.append(token)
            places.append(len(tokens) - 1)
        return places if tokens == self.ids(sequence) else None

    def count_unknown(self, sequence: str) -> tuple[int, int]:
        """See `MegatronTokens`: residues, or tokens where these are not residues."""
        if self.token_of_character(sequence) is None:
            ids = self.ids(sequence)
            return ids.count(self._unknown), len(ids)
        return sum(self._of_character(letter) == self._unknown for letter in sequence), len(sequence)

    def _character(self, character: str) -> int:
        ids = self._model.encode(character)
        return int(ids[0]) if len(ids) == 1 else int(self._unknown)


class SmilesTokens(MegatronTokens):
    """A regular expression that cuts SMILES up, and a vocabulary; no token is added."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()
    padding = PADDING

    def __init__(self, expression: str, vocabulary: str) -> None:
        """Takes the content of the two files.

        Args:
            expression: a regular expression without capturing groups.
            vocabulary: one token per line; ids count on from 0.

        Raises:
            CheckpointError: there is no such expression, or no token `?` for what is unknown.
        """
        found = expression.strip()
        if not found:
            raise CheckpointError("expected a regular expression, found an empty file")
        try:
            inner, whole = re.compile(found), re.compile(f"({found}|.)")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"expected a regular expression, found {found[:60]!r} ({error})") from error
        if inner.groups:
            remedy = "write (?: for ("
            raise CheckpointError(f"expected a regular expression without groups, found {found[:60]!r}; {remedy}")
        self._split = whole.findall
        self.content = {"expression": expression, "vocabulary": vocabulary}
        self._ids: dict[str, int] = {}
        for line in re.split(r"\r\n?|\n", vocabulary):
            if line.strip():
                self._ids[line.strip()] = len(self._ids)
        if UNKNOWN not in self._ids:
            raise CheckpointError(f"expected a vocabulary with '{UNKNOWN}' for unknown tokens, found none in it")
        self.size = max(*self._ids.values(), PADDING) + 1
        content = "\n".join([found, *map(str, self._ids.items())])
        self.digest = f"regex {hashlib.sha256(content.encode()).hexdigest()}"

    def ids(self, sequence: str) -> list[int]:
        """See `MegatronTokens`."""
        return [self._ids.get(token, self._ids[UNKNOWN]) for token in self._split(sequence)]

    def token_of_character(self, sequence: str) -> list[int] | None:  # noqa: ARG002
        """None: a token may be several characters."""
        return None

    def count_unknown(self, sequence: str) -> tuple[int, int]:
        """See `MegatronTokens`: tokens."""
        ids = self.ids(sequence)
        return ids.count(self._ids[UNKNOWN]), len(ids)


def read_tokens(content: Mapping[str, Any]) -> MegatronTokens:
    """The tokenizer with this `content`."""
    if "sentencepiece" in content:
        return ProteinTokens(bytes.fromhex(content["sentencepiece"]), content["around"])
    return SmilesTokens(content["expression"], content["vocabulary"])
