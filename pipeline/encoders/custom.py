"""A user's own code as an `Encoder`: a class named by its path in `infer_target`, or a live module's own method."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from pipeline.encoders.code_digest import class_name, code_digest, no_reuse
from pipeline.encoders.digests import weights_digest
from pipeline.encoders.protocol import Encoder, no_first
from pipeline.errors import CheckpointError, ConfigError

# The optional attributes and methods of a user's object; `CustomEncoder` asks for the others by name.
OPTIONAL = "max_seq_length precision packs notes made_with step per_character count_unknown why_unknown".split()
Context = Callable[[], AbstractContextManager[Any]]


class CustomEncoder(Encoder):
    """An `Encoder` around an object that has `hidden_states(sequences)`, and may have the rest of the protocol.

    What the object lacks is as `Encoder` has it by default; the hidden size is found by embedding `probe`. A `digest`
    that the object computes is the encoder's. A string of the class cannot depend on weights: it stands for the code
    alone; see `code_digest`.
    """

    def __init__(
        self,
        inner: Any,
        digest: str | None,
        device: torch.device,
        context: Context = nullcontext,
        probe: str | None = None,
        owner: Any = None,
        note: str = "",
    ) -> None:
        """Wraps `inner`, whose `hidden_states` is called within `context`.

        `digest` is None where the code is not known; `owner` is the class that the user wrote, by default `inner`'s.
        `note` says what follows from having no digest, by default that of code that is not known.

        Raises:
            CheckpointError: `inner` has no `hidden_states`, or no `hidden_size` and there is no `probe`.
        """
        for name in ("hidden_states",) if probe is not None else ("hidden_size", "hidden_states"):
            if not hasattr(inner, name):
                raise CheckpointError(f"infer_target: {type(inner).__name__} has no '{name}'; see pipeline.Encoder")
        self.inner: Any = inner
        self._owner = owner or type(inner)
        self.context = context
        for name in OPTIONAL:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        digest = _given_digest(inner) or digest
        self.reusable: bool = digest is not None and bool(getattr(inner, "reusable", True))
        self.digest: str = digest or f"no digest {uuid4().hex}"
        if digest is None:
            self.notes: tuple[str, ...] = (*self.notes, note or no_reuse(self._owner, "embeddings are made"))
        self.device: torch.device = torch.device(getattr(inner, "device", device))
        size = getattr(inner, "hidden_size", None)
        self.hidden_size: int = int(size) if size is not None else self._found_size(probe or "")

    @classmethod
    def from_checkpoint(cls, encoder_class: Any, source: str, device: torch.device) -> CustomEncoder:
        """Opens `source` with the class's own `from_checkpoint`."""
        failed = f"ckpt: {class_name(encoder_class)} cannot open '{source}'"
        inner = _made(encoder_class, "from_checkpoint(path)", source, failed)
        return cls(inner, own_digest(encoder_class, [type(inner)], lambda: _bytes_digest(Path(source))), device)

    @classmethod
    def from_object(cls, inner: Any, device: torch.device) -> CustomEncoder:
        """Wraps an object that is there already. Embeddings are used again where it has a `digest` of its own alone."""
        why = f"{type(inner).__name__} has no digest, so embeddings are made anew each time; give the object one"
        return cls(inner, None, device, note=f"{why}, a string to change with its weights and code")

    @classmethod
    def from_module(
        cls, encoder_class: Any, module: nn.Module, device: torch.device, context: Context, mode: str
    ) -> CustomEncoder:
        """Wraps a live module with the class's own `from_module`; `mode` names the arithmetic of `context`."""
        inner = made_from_module(encoder_class, module)
        classes = [type(inner), *map(type, module.modules())]
        return cls(
            inner, own_digest(encoder_class, classes, lambda: f"{mode} {module_digest(module)}"), device, context
        )

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`. Raises CheckpointError where the class returns something else."""
        return self._checked(sequences, "hidden_states")

    def states_from_first(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.states_from_first`. Raises CheckpointError where the class returns something else."""
        return self._checked(sequences, "states_from_first")

    def with_pooling(self, pooling: str) -> CustomEncoder:
        """This encoder, to be pooled so. Raises CheckpointError where the user's code has no state for `cls`."""
        own = getattr(self.inner, "states_from_first", None)
        if pooling == "cls" and getattr(own, "__func__", own) in (None, Encoder.states_from_first):
            raise no_first(f"{self._owner.__name__} has no states_from_first(sequences)")
        self.pooling = pooling
        return self

    def _checked(self, sequences: Sequence[str], method: str) -> list[Tensor]:
        states = self._states(sequences, method)
        shapes = [tuple(getattr(state, "shape", ())) for state in states]
        if len(states) != len(sequences) or any(len(s) != 2 or s[1] != self.hidden_size for s in shapes):
            expected = f"{len(sequences)} tensors of shape (tokens, {self.hidden_size})"
            raise CheckpointError(f"infer_target: {method}: expected {expected}, found shapes {shapes[:3]}")
        return [state.detach().float().clone() for state in states]  # their buffer may be used again

    def _states(self, sequences: Sequence[str], method: str = "hidden_states") -> list[Tensor]:
        with torch.no_grad(), self.context():
            states = getattr(self.inner, method)(list(sequences))
        if isinstance(states, Tensor):
            raise CheckpointError(f"infer_target: {method}: expected a list of tensors, found one with padding")
        return list(states)

    def _found_size(self, probe: str) -> int:
        states = self._states([probe])
        if len(states) != 1 or getattr(states[0], "ndim", 0) != 2:
            expected = "expected a list of tensors of shape (length, hidden_size)"
            raise CheckpointError(f"{type(self.inner).__name__}.hidden_states: {expected}, found {states!r:.100}")
        return int(states[0].shape[1])


def made_from_module(encoder_class: Any, module: nn.Module) -> Any:
    """What the class's own `from_module` makes of a live module. Raises CheckpointError where it cannot."""
    what = f"{class_name(encoder_class)}.from_module cannot take the module {type(module).__name__}"
    return _made(encoder_class, "from_module(module)", module, f"infer_target: {what}")


def _made(encoder_class: Any, method: str, argument: Any, failed: str) -> Any:
    """The object that `method` of a user's class makes. Raises CheckpointError, which begins with `failed`."""
    own = getattr(encoder_class, method.partition("(")[0], None)
    if own is None:
        raise CheckpointError(f"infer_target: {class_name(encoder_class)} has no {method}; see pipeline.Encoder")
    try:
        return own(argument)
    except Exception as error:  # the user's code may raise anything
        raise CheckpointError(f"{failed}: {type(error).__name__}: {error}") from error


def no_layer(layer: int | None, source: str) -> None:
    """Raises ConfigError where a layer is asked of a user's own code, which decides for itself."""
    if layer is not None:
        raise ConfigError(f"layer: {source} gives the hidden states itself; choose the layer there, and set layer=null")


def own_digest(owner: Any, others: Sequence[Any], weights: Callable[[], str]) -> str | None:
    """The digest of a user's own encoder: its code and its weights. None where its code cannot be known."""
    code = code_digest(owner, *others)
    return None if code is None else f"{class_name(owner)} {code} {weights()}"


def module_digest(module: nn.Module) -> str:
    """A digest of all weights and buffers in a module's `state_dict`."""
    tensors = [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]
    return weights_digest(tensors)


def _given_digest(inner: Any) -> str | None:
    """The digest that an object computes itself, from its weights too; None where it has no such digest."""
    of_class = isinstance(inspect.getattr_static(type(inner), "digest", None), str)
    if of_class and "digest" not in getattr(inner, "__dict__", {}):
        return None
    given = getattr(inner, "digest", None)
    return None if given is None else str(given)


def _bytes_digest(source: Path) -> str:
    digest = hashlib.sha256(str(source).encode() if not source.exists() else b"")
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
