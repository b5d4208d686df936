"""Embedding on two ranks of one thread each, beside two processes that have nothing to do with each other.

    python benchmarks/scale.py [--limit N] [--rounds 3] [--json FILE]
    python benchmarks/scale.py --ray [--sequences 1000 10000 100000] [--json FILE]

The ranks share one batch plan and one store, over gloo; together they do what one process does. Each of the independent
processes runs the same stage on half of the sequences, into a store of its own, without a word to the other: more than
that two processes cannot do on this machine. Both are timed in turn, in the same processes, by the slower of the two.
Imports, models and data are there before the clock starts.

With `--ray`, generated sequences of 80 to 120 residues are embedded, a row of width 16 per residue, in this process
and with `engine: ray` on two workers, whose object store has 200 MB. The encoder is a fake one: what is seen are the
costs of Ray. Each measurement has a process of its own; memory is that process's anonymous memory at its peak, above
what it had when the data were loaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from memory import FakeEncoder, Peak, task_in, write_task
from rich.console import Console
from rich.table import Table
from timing import report, write
from work import make_esm, parser, proteins, sequences_of

from pipeline import Store
from pipeline.embed import BATCH_TOKENS, embed
from pipeline.encoders.forward import batches
from pipeline.encoders.remote import RemoteEncoder
from pipeline.engines.ray_engine import Needs, RayEngine, connected
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


ENGINES = {"local": "this process", "ray": "Ray, two workers"}


def on_engine(name: str, folder: Path) -> dict[str, float]:
    """Embeds the task in a folder. Gives seconds, MB, and how many sequences there were."""
    torch.set_num_threads(1)
    examples, make = load(task_in(folder)), partial(FakeEncoder, 16)
    peak, store = Peak(), Store(folder / name, memory_bytes=10**7)
    time.sleep(0.1)
    before = peak.most
    with engine(name) as found:
        encoder = make() if found is None else RemoteEncoder(found, make)
        began = time.perf_counter()
        (embeddings,) = embed([examples], encoder, store)
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "mb": peak.most - before, "sequences": float(embeddings.metrics["embedded"])}


@contextmanager
def engine(name: str) -> Iterator[RayEngine | None]:
    """Ray with two processors and a small object store; None for this process."""
    if name == "local":
        yield None
        return
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    ray.init("local", num_cpus=2, object_store_memory=2 * 10**8, include_dashboard=False, log_to_driver=False)
    with connected(Needs(1)) as found:
        yield found
    ray.shutdown()


def compare_engines(options: argparse.Namespace) -> None:
    """Prints the table of `--ray`."""
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ENGINES}
    view = Table("", *(f"{count}: s" for count in options.sequences), *(f"{count}: MB" for count in options.sequences))
    for count in options.sequences:
        with tempfile.TemporaryDirectory() as name:
            write_task(Path(name), count)
            for one in ENGINES:
                command = [sys.executable, __file__, "--ray", "--engine", one, "--folder", name]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[one][count] = json.loads(output.splitlines()[-1])
    for one, shown in ENGINES.items():
        values = found[one].values()
        view.add_row(shown, *(f"{each['seconds']:.1f}" for each in values), *(f"{each['mb']:.0f}" for each in values))
    Console(width=110).print(view)
    write(found, options.json)


def slower(pipes: list[Connection], request: str) -> float:
    """Seconds of the slower of the two."""
    for pipe in pipes:
        pipe.send(request)
    return max(float(pipe.recv()) for pipe in pipes)


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--ray", action="store_true")
    arguments.add_argument("--sequences", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    arguments.add_argument("--engine", help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.engine:
        print(json.dumps(on_engine(options.engine, options.folder)))
        return
    if options.ray:
        compare_engines(options)
        return
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
