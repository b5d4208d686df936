"""One rank of two: what it hears of the other's results, failures and interrupts. Started by test_ranks.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.training.ranks import Ranks

RANK = int(os.environ["RANK"])


class Interrupted(Ranks):
    """Ctrl-C on rank 0, when all have arrived and begin to exchange their messages."""

    def arrive(self, within: timedelta | None = None) -> None:
        super().arrive(within)
        if RANK == 0 and within is None:
            raise KeyboardInterrupt


def stop() -> None:
    if RANK == 0:
        raise KeyboardInterrupt


def seen(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks(60.0)
    ranks.open()
    found = {
        "first": ranks.from_first(lambda: {"rank": RANK, "content": "x" * 1_000}),
        "nothing": ranks.from_first(lambda: None),
        "unpicklable": seen(lambda: ranks.from_first(lambda: stop if RANK else lambda: None)),
        "failed": seen(lambda: ranks.from_first(lambda: 1 // RANK)),
        "nested": seen(lambda: ranks.together(lambda: ranks.together(lambda: ranks.from_first(stop)))),
        "afterwards": ranks.together(lambda: RANK),
    }
    ranks = Interrupted(40.0)
    ranks.open()
    found["in exchange"] = seen(lambda: ranks.together(lambda: ranks.together(lambda: RANK)))
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
