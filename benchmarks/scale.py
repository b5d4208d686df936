"""Embedding on two ranks of one thread each, beside two processes that have nothing to do with each other.

    python benchmarks/scale.py [--limit N] [--rounds 3] [--json FILE]

The ranks share one batch plan and one store, over gloo; together they do what one process does. Each of the independent
processes runs the same stage on half of the sequences, into a store of its own, without a word to the other: more than
that two processes cannot do on this machine. Both are timed in turn, in the same processes, by the slower of the two.
Imports, models and data are there before the clock starts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from timing import report, write
from work import make_esm, parser, proteins, sequences_of

from pipeline import Store
from pipeline.embed import BATCH_TOKENS, embed
from pipeline.encoders.forward import batches
from pipeline.load import load
from pipeline.store.embedding_table import sequence_key
from pipeline.training.ranks import Ranks


def worker(rank: int, port: int, options: argparse.Namespace, pipe: Connection) -> None:
    """Answers each request with the seconds that it took: its share as a rank, or half of the sequences alone."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    ranks = Ranks(600.0)
    ranks.open()
    encoder = make_esm()
    examples = load(proteins(options.proteins, options.limit), encoder.max_seq_length)
    texts = {sequence_key(text): text for text in sequences_of(examples)}
    plan = list(batches(texts, BATCH_TOKENS["cpu"], 128, encoder.packs))
    own = [texts[key] for keys in plan[rank::2] for key in keys]
    half = replace(examples, train=replace(examples.train, sequences=own), test=replace(examples.test, sequences=[]))
    pipe.send(len(texts))
    while (request := pipe.recv()) != "stop":
        encoder.__dict__.pop("digest", None)
        with tempfile.TemporaryDirectory() as folder:
            place = ranks.from_first(partial(str, folder))  # both begin now
            began = time.perf_counter()
            if request == "alone":
                embed([half], encoder, Store(Path(folder)))
            else:
                embed([examples], encoder, Store(Path(place)), ranks)
            pipe.send(time.perf_counter() - began)
            ranks.arrive()


def slower(pipes: list[Connection], request: str) -> float:
    """Seconds of the slower of the two."""
    for pipe in pipes:
        pipe.send(request)
    return max(float(pipe.recv()) for pipe in pipes)


def main() -> None:
    """Prints the table."""
    options = parser(__doc__).parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("spawn"), list[Connection](), []
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(rank, port, options, theirs)))
        processes[-1].start()
        pipes.append(ours)
    count, _ = (pipe.recv() for pipe in pipes)
    ways = {"two independent processes": "alone", "two ranks": "shared"}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    slower(pipes, "alone")  # the first is slow
    for _ in range(options.rounds):
        for way, request in ways.items():
            seconds[way].append(slower(pipes, request))
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()
    title = f"embedding {count} proteins, two processes of one thread"
    write(report(title, seconds, "two ranks"), options.json)


if __name__ == "__main__":
    main()
