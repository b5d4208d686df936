"""An encoder that other processes have open: here is what the pipeline must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.encoders.protocol import Encoder

# The attributes of an encoder that are read here.
DESCRIBED = """
hidden_size device digest max_seq_length precision pooling packs reusable notes made_with step
""".split()


class Host(Protocol):
    """A process with an encoder in it."""

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """What `question(encoder, *arguments)` gives there."""


class Engine(Protocol):
    """Has work done in other processes; see `RayEngine`."""

    def host(self, make: Callable[[], Any]) -> Host:
        """A process with what `make` gives there."""

    def stream(self, make: Callable[[], Any], work: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What `work(made, item)` gives for each item, in order, in a pool of processes that have what `make` gives."""


class RemoteEncoder(Encoder):
    """An encoder that an engine's processes open. One of them describes it; a pool of them embeds."""

    hidden_size: int
    device: torch.device
    digest: str
    kind: str  # see `kind_of`

    def __init__(self, engine: Engine, make: Callable[[], Encoder]) -> None:
        """Has a process open the encoder with `make`. Raises what `make` does."""
        self._engine, self._make = engine, make
        self._host = engine.host(make)
        vars(self).update(self._host.ask(_described))

    def elsewhere(self, work: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See `Elsewhere`."""
        return self._engine.stream(self._make, work, items)

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`."""
        return list(self._called("hidden_states", sequences))

    def states_from_first(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.states_from_first`."""
        return list(self._called("states_from_first", sequences))

    def per_character(self, sequence: str, states: Tensor) -> Tensor:
        """See `Encoder.per_character`."""
        found: Tensor = self._called("per_character", sequence, states)
        return found

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `Encoder.count_unknown`."""
        return list(self._called("count_unknown", sequences))

    def why_unknown(self, sequence: str) -> str:
        """See `Encoder.why_unknown`."""
        return str(self._called("why_unknown", sequence))

    def untrained(self, seed: int) -> Encoder | None:
        """See `Encoder.untrained`."""
        found = self._host.ask(lambda encoder: encoder.untrained(seed) is not None)
        return RemoteEncoder(self._engine, partial(_untrained, self._make, seed)) if found else None

    def _called(self, method: str, *arguments: Any) -> Any:
        return self._host.ask(lambda encoder: getattr(encoder, method)(*arguments))


def _described(encoder: Encoder) -> dict[str, Any]:
    found = {name: getattr(encoder, name) for name in DESCRIBED}
    return {**found, "notes": tuple(encoder.notes), "made_with": dict(encoder.made_with), "kind": kind_of(encoder)}


def kind_of(encoder: Encoder) -> str:
    """What a model is, for whoever filters by it: its type in transformers, or else the class that embeds."""
    if isinstance(encoder, RemoteEncoder):
        return encoder.kind
    config = getattr(getattr(encoder, "model", None), "config", None)
    return str(getattr(config, "model_type", None) or type(getattr(encoder, "inner", encoder)).__name__)


def _untrained(make: Callable[[], Encoder], seed: int) -> Encoder:
    found = make().untrained(seed)
    assert found is not None  # `RemoteEncoder.untrained` has asked
    return found
