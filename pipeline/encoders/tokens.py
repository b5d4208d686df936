"""Sequences to token ids, through a Hugging Face tokenizer that is called with single words.

Calling a tokenizer on whole sequences has traps: ESM's merges a run of unknown residues into one token, ProtT5's wants
blanks between residues, others want SMILES cut up beforehand. So sequences are split here, by residue or by the usual
SMILES expression, and each distinct word is looked up once. Where the tokenizer does not agree with either way of
splitting (a byte-pair vocabulary, say), it splits for itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.encoders.internals import panics_as_errors
from pipeline.errors import CheckpointError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SMILES = "CC(=O)Oc1ccccc1C(=O)NCCBr"
# The expression of Schwaller et al., "Found in Translation", Chem. Sci. 2018, 9, 6091; as in MegaMolBART.
SMILES_TOKEN = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%\d{2}|\d|."
)
RARE_RESIDUES = str.maketrans("UZOB", "XXXX")  # as the authors of ProtTrans do for models with spaced residues


class Tokens:
    """How a model's tokenizer turns a sequence into ids.

    Attributes:
        splitting: `residues`, `spaced residues`, `smiles` or `tokenizer`.
        before: ids of the special tokens in front of a sequence.
        after: ids of the special tokens behind it.
        unknown: the id that stands for what the tokenizer does not know, None if it knows everything.
        padding: the id to pad with.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Finds out how `tokenizer` wants sequences split. Raises CheckpointError if its template is not known."""
        self.tokenizer = tokenizer
        self.unknown: int | None = tokenizer.unk_token_id
        self.padding: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._known = cache(self._word)
        self._of_character = np.full(256, -1)  # ids of single characters, as far as they are known
        self.splitting: str
        self.splitting, self._split = self._choose()
        self.before: list[int]
        self.after: list[int]
        self.before, self.after = self._template()

    def ids(self, sequence: str) -> npt.NDArray[np.int64]:
        """The ids of the real tokens of `sequence`, special tokens left out, shape (tokens,)."""
        if self._split is None:
            return np.array(self._native(sequence), np.int64)
        words = self._split(sequence)
        if not isinstance(words, str) or not words.isascii():
            return np.array([self._known(word) for word in words], np.int64)
        codes = np.frombuffer(words.encode("ascii"), np.uint8)
        ids = self._of_character[codes]
        if (ids < 0).any():
            for character in set(words):
                self._of_character[ord(character)] = self._known(character)
            ids = self._of_character[codes]
        return ids

    def ordinary(self, most: int) -> list[int]:
        """Some ids of the vocabulary that are not special, at most so many."""
        special = set(self.tokenizer.all_special_ids)
        return [number for number in sorted(self.tokenizer.get_vocab().values()) if number not in special][:most]

    def why_unknown(self, text: str) -> str:
        """What to do about a text of unknown tokens alone, where its characters are in the vocabulary as they are."""
        if not self._lowers() or not set(text) & set(self.tokenizer.get_vocab()):
            return ""
        file = Path(str(self.tokenizer.name_or_path)) / "tokenizer_config.json"
        setting = 'set "do_lower_case": false in' if file.is_file() else 'write {"do_lower_case": false} to'
        place = f"'{file}'" if file.parent.is_dir() else "tokenizer_config.json beside the vocabulary"
        return f"; the tokenizer lower-cases sequences and the vocabulary has capitals: {setting} {place}"

    def digest(self) -> str:
        """A digest of the vocabulary and of how sequences are split; the same in every version of the library."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = json.loads(backend.to_str()) if backend is not None and self._split is None else {}
        rules = {key: state.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        single = [self._native(chr(code)) for code in range(33, 127)]  # what rules make of each printable character
        what = [self.splitting, self.before, self.after, self.unknown, vocabulary, rules, single]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def _lowers(self) -> bool:
        """Whether the tokenizer lower-cases its input."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return bool(getattr(self.tokenizer, "do_lower_case", False))
        return backend.normalizer is not None and bool(backend.normalizer.normalize_str("A") == "a")

    def _choose(self) -> tuple[str, Callable[[str], Sequence[str]] | None]:
        """The first way of splitting in which the words looked up singly give what the tokenizer itself gives."""
        ways: list[tuple[str, str, Callable[[str], Sequence[str]], str]] = [
            ("residues", RESIDUES, str, ""),
            ("spaced residues", RESIDUES, methodcaller("translate", RARE_RESIDUES), " "),
            ("smiles", SMILES, SMILES_TOKEN.findall, ""),
            ("smiles", SMILES, SMILES_TOKEN.findall, " "),
        ]
        for name, probe, split, between in ways:
            words = split(probe)
            if between and self._takes_whole(probe):
                continue
            singly = [self._native(word) for word in words]
            alone = all(len(ids) == 1 and ids[0] != self.unknown for ids in singly)
            if alone and self._native(between.join(words)) == [ids[0] for ids in singly]:
                return name, split
        return "tokenizer", None

    def _takes_whole(self, text: str) -> bool:
        """Whether the tokenizer knows a text without blanks: then it is not given any that it would leave out."""
        try:
            ids = self._native(text)
        except CheckpointError:
            return False
        return bool(ids) and self.unknown not in ids

    def _template(self) -> tuple[list[int], list[int]]:
        probe = SMILES if self.splitting in ("smiles", "tokenizer") else RESIDUES
        inner, whole = self._native(probe), self._native(probe, special=True)
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        name = type(self.tokenizer).__name__
        raise CheckpointError(f"tokenizer {name}: expected special tokens around the sequence, found them within it")

    def _native(self, text: str, special: bool = False) -> list[int]:
        """The ids that the tokenizer itself gives. Raises CheckpointError where it fails, because it is broken."""
        try:
            with panics_as_errors():
                ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except Exception as error:  # whatever a library raises on a broken tokenizer, the tokenizer is at fault
            name = type(self.tokenizer).__name__
            found = f"{text[:60]!r} cannot be made tokens ({error}); are its files whole?"
            raise CheckpointError(f"ckpt: tokenizer {name}: {found}") from error
        if None in ids:
            raise CheckpointError(f"ckpt: tokenizer: {text[:60]!r} is not in the vocabulary, nor is an unknown token")
        return list(ids)

    def _word(self, word: str) -> int:
        """The id of a single word; a word that is not exactly one token is unknown."""
        ids = self._native(word)
        if len(ids) == 1 and ids[0] not in self.before + self.after:
            return ids[0]
        if self.unknown is None:
            raise CheckpointError(f"tokenizer: {word!r} is not in the vocabulary, and there is no unknown token for it")
        return self.unknown
