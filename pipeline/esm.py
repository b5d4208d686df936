"""ESM-2's vocabulary, as a tokenizer that needs no file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import EsmTokenizer

VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


def make_tokenizer() -> EsmTokenizer:
    """ESM-2's own, made from its vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(VOCABULARY), encoding="utf-8")
        return EsmTokenizer(str(path))
