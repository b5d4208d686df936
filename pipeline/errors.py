"""The error tree. Every message is one line: what was expected, what was found, and the remedy.

All that is wrong with data is one error, with each of its messages on a line.

PipelineError
├── ConfigError       the YAML, an override, or a combination of settings
├── DataError         a CSV file: names file, line and column
├── CheckpointError   `ckpt` does not exist, cannot be read, or does not fit the task
├── CacheError        the embedding store cannot be read or written
├── TrackingError     a tracker cannot be reached or refuses a name
└── EngineError       Ray cannot be reached, or has lost a worker too often
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PipelineError(Exception):
    """A mistake that the user can put right. The command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        """Keeps `message` on one line, whatever library text it quotes."""
        super().__init__(" ".join(message.split()))


class ConfigError(PipelineError):
    """The configuration is not valid."""


class DataError(PipelineError):
    """A labelled CSV file is not valid, or several things are wrong: then each has a line of its own."""

    def __init__(self, *messages: str) -> None:
        """Keeps each message on one line."""
        super().__init__(messages[0])
        self.args = tuple(" ".join(message.split()) for message in messages)

    def __str__(self) -> str:
        """The message; of several, how many there are, and each on a line."""
        lines = [f"  {number}. {message}" for number, message in enumerate(self.args, 1)]
        return str(self.args[0]) if len(lines) == 1 else "\n".join([f"{len(lines)} defects in the data:", *lines])


class CheckpointError(PipelineError):
    """A checkpoint cannot be opened, or does not fit what is asked of it."""


class CacheError(PipelineError):
    """The embedding store cannot be read or written."""


class TrackingError(PipelineError):
    """A tracker cannot be used."""


class EngineError(PipelineError):
    """Work that was to run elsewhere did not."""


def raise_all(errors: Sequence[PipelineError]) -> None:
    """Raises the error where there is one, and several as one DataError with each message once."""
    messages = dict.fromkeys(message for error in errors for message in error.args)
    if len(messages) > 1:
        raise DataError(*messages)
    if errors:
        raise errors[0]


FEW = 5  # of many names are shown


def few_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    >>> few_of(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or all of them where none is close."""
    options = [str(option) for option in known]
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}" if options else ""
