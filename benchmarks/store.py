"""The store: writing and reading embeddings, beside the same bytes through plain `numpy.tofile` and `fromfile`.

    python benchmarks/store.py [--proteins FOLDER] [--limit N] [--rounds 3] [--json FILE]

Rows are random numbers, as many as the proteins have tokens, of width 320 (`float32`). Both ways of reading consume
every byte (a sum); ours verifies every checksum besides. What writing adds to embedding is in `embed.py`: *ours* beside
*without the store*; here are its own seconds, the disk's included, as a share of the forward passes'.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from embed import without_store
from timing import in_turn, report, write
from work import chosen, parser, sequences_of

from pipeline.store.embedding_table import EmbeddingTable, Store, sequence_key
from pipeline.store.reading import Rows

WIDTH = 320


def write_table(root: Path, counts: list[int], rows: np.ndarray) -> EmbeddingTable:
    """A table with sequences of `counts` rows, batch by batch as `embed` does."""
    table, begin = Store(root).table("benchmark", "none", WIDTH), 0
    with table.lock(), table.writer({}) as writer:
        for number, count in enumerate(counts):
            writer.add([sequence_key(str(number))], [0], [count], rows[begin : begin + count])
            writer.count(count)
            begin += count
            if writer.is_full:
                writer.flush()
    return table


def main() -> None:
    """Prints the tables."""
    options = parser(__doc__).parse_args()
    encoder, _, examples = chosen(options, "proteins")
    counts = [len(text) for text in sequences_of(examples)]
    rows = np.random.default_rng(0).standard_normal((sum(counts), WIDTH), dtype=np.float32)
    with tempfile.TemporaryDirectory() as name:
        root, plain = Path(name), Path(name) / "plain"
        table = write_table(root / "read", counts, rows)
        rows.tofile(plain)

        def ours_write() -> None:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                write_table(Path(folder), counts, rows)

        def ours_read() -> None:
            Rows(table, table.index().values(), 2**62).memory.numpy().sum()

        writing = {"ours": ours_write, "numpy.tofile": lambda: rows.tofile(root / "other")}
        reading = {"ours": ours_read, "numpy.fromfile": lambda: np.fromfile(plain, np.float32).sum()}
        size = f"{rows.nbytes / 1e6:.0f} MB, {len(counts)} sequences"
        wrote = in_turn(writing, 3 * options.rounds, warm=True)
        results = [report(f"writing {size}", wrote, "ours")]
        results.append(report(f"reading {size}", in_turn(reading, 5 * options.rounds, warm=True), "ours"))
    began = time.perf_counter()
    without_store(encoder, sequences_of(examples))
    passes = time.perf_counter() - began
    share = results[0]["ways"]["ours"]["median_s"] / passes
    threads = torch.get_num_threads()
    print(f"writing takes {share:.1%} of the seconds of the forward passes ({passes:.1f} s, {threads} threads)")
    write([*results, {"share_of_embedding": share}], options.json)


if __name__ == "__main__":
    main()
