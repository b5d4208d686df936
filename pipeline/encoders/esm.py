"""ESM-2's vocabulary, as a tokenizer that needs no file."""

from __future__ import annotations

from transformers import EsmTokenizer

from pipeline.store.temporary import temporary_folder

VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


def make_tokenizer() -> EsmTokenizer:
    """ESM-2's own, made from its vocabulary."""
    with temporary_folder() as folder:
        path = folder / "vocab.txt"
        path.write_text("\n".join(VOCABULARY), encoding="utf-8")
        return EsmTokenizer(str(path))
