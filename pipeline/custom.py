"""A user's own encoder class, named by its path in `infer_target`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError


class CustomEncoder:
    """An `Encoder` around an object that has `hidden_size` and `hidden_states(sequences)`, and may have the rest.

    Missing attributes are filled in: no limit of length, no unknown tokens, and a digest of the checkpoint's bytes.
    """

    def __init__(self, inner: Any, digest: str, device: torch.device) -> None:
        """Checks that `inner` has what cannot be filled in. Raises CheckpointError if it has not."""
        for name in ("hidden_size", "hidden_states"):
            if not hasattr(inner, name):
                raise CheckpointError(f"infer_target: {type(inner).__name__} has no '{name}'; see pipeline.Encoder")
        self.inner = inner
        self.hidden_size = int(inner.hidden_size)
        self.max_seq_length: int | None = getattr(inner, "max_seq_length", None)
        self.digest = str(getattr(inner, "digest", digest))
        self.device = torch.device(getattr(inner, "device", device))

    @classmethod
    def from_checkpoint(cls, encoder_class: Any, source: str, device: torch.device) -> CustomEncoder:
        """Opens `source` with the class's own `from_checkpoint`."""
        name = getattr(encoder_class, "__qualname__", str(encoder_class))
        if not hasattr(encoder_class, "from_checkpoint"):
            raise CheckpointError(f"infer_target: {name} has no from_checkpoint(path); see pipeline.Encoder")
        try:
            inner = encoder_class.from_checkpoint(source)
        except Exception as error:  # the user's code may raise anything; it is about this checkpoint
            raise CheckpointError(f"ckpt: {name} cannot open '{source}': {type(error).__name__}: {error}") from error
        return cls(inner, f"{encoder_class.__module__}.{name} {_bytes_digest(Path(source))}", device)

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`. Raises CheckpointError where the class returns something else."""
        with torch.inference_mode():
            states = list(self.inner.hidden_states(list(sequences)))
        shapes = [tuple(getattr(state, "shape", ())) for state in states]
        if len(states) != len(sequences) or any(len(s) != 2 or s[1] != self.hidden_size for s in shapes):
            expected = f"{len(sequences)} tensors of shape (tokens, {self.hidden_size})"
            raise CheckpointError(f"infer_target: hidden_states: expected {expected}, found shapes {shapes[:3]}")
        return [state.detach().float() for state in states]

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `Encoder.count_unknown`."""
        if hasattr(self.inner, "count_unknown"):
            return list(self.inner.count_unknown(sequences))
        return [(0, len(sequence)) for sequence in sequences]


def _bytes_digest(source: Path) -> str:
    digest = hashlib.sha256(str(source).encode() if not source.exists() else b"")
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
