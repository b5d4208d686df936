"""What Ray runs in the processes that it starts for `ray_engine`."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.engines.elsewhere import Answer
from pipeline.errors import EngineError

TRIES = 3  # of work whose process has ended, after the first
LOST = (
    "where memory was short, set ray.workers or max_batch_tokens lower; "
    "with RAY_BACKEND_LOG_LEVEL=info in the environment Ray's own log says more"
)


class Hosted:
    """The object of `Host`, in its own process."""

    def __init__(self, arguments: bytes) -> None:
        make, self._settings = pickle.loads(arguments)  # noqa: S301  # from the program that started this process
        self._made = self._settings.run(make)

    def ask(self, arguments: bytes) -> Answer:
        """See `Host.ask`."""
        question, values = pickle.loads(arguments)  # noqa: S301  # as above
        found: Answer = self._made.then(self._settings, lambda made: question(made, *values))
        return found


class Pooled:
    """The object of `RayEngine.stream`, in each process of the pool."""

    def __init__(self, arguments: bytes, tries: Any) -> None:
        make, self._work, self._settings = pickle.loads(arguments)  # noqa: S301  # from the program that started it
        self._tries = tries
        self._made = self._settings.run(make)

    def __call__(self, groups: Any) -> Any:
        """The pickled answers to each group of a table."""
        import pyarrow as pa

        pairs = zip(groups["number"].to_pylist(), groups["group"].to_pylist(), strict=True)
        found = [pickle.dumps(self._of_group(number, group), protocol=5) for number, group in pairs]
        return pa.table({"found": pa.array(found, pa.large_binary())})

    def _of_group(self, number: int, group: Sequence[bytes]) -> list[Answer]:
        """The answers to a group; an error where process after process has ended with it."""
        import ray

        if ray.get(self._tries.of.remote(number)) > 1 + TRIES:
            ended = f"engine: {1 + TRIES} worker processes have ended, one after another, with the same sequences"
            return [Answer(error=EngineError(f"{ended}; {LOST}"))]
        return [self._of(item) for item in group]

    def _of(self, item: bytes) -> Answer:
        found: Answer = self._made.then(self._settings, lambda made: self._work(made, pickle.loads(item)))  # noqa: S301
        return found


class Tries:
    """Counts how often each group was begun: Ray Data itself would begin it without an end."""

    def __init__(self) -> None:
        """None yet."""
        self._begun = Counter[int]()

    def of(self, number: int) -> int:
        """Counts, and gives, those of a group."""
        self._begun[number] += 1
        return self._begun[number]


def done(arguments: bytes, job: Any) -> Answer:
    """A job of `RayEngine.answers`, in a process of its own."""
    work, settings = pickle.loads(arguments)  # noqa: S301  # from the program that started this process
    found: Answer = settings.run(lambda: work(job))
    return found
