"""Kills the command line two hundred times, and looks at what is left once a program has ended well.

Two programs at a time work on one store and one tracking database, and each is sent SIGKILL at a moment drawn from the
whole length of a run. Then one program measures all of the checkpoints undisturbed. Its scores, predictions,
embeddings and heads must be those of an undisturbed program on a fresh store, to the last bit, and nothing may be left
in the store, among the journals or in TMPDIR, and no run RUNNING.

A program is `pipeline.__main__.main` in a process of its own, forked from one that has imported everything and done
nothing else: the imports take longer than all else, and are not what is to be killed. Shards are made small, so that a
run writes several; there are several checkpoints, so that there is always something that is not stored yet.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AT_ONCE = 2
SHARD_TOKENS = 400
# Said of how a result came about, not of the result.
OF_THE_WAY = {"seconds", "embedded", "cached", "cache_hits", "tokens", "tokens_per_second", "reused"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Place:
    """Where programs work: a store, a tracking database, and a log of what they print."""

    root: Path

    @property
    def uri(self) -> str:
        """Of the tracking database."""
        return f"sqlite:///{self.root}/mlflow.db"

    def command(self, ckpt: str) -> list[str]:
        """The arguments of a measurement."""
        options = f"store={self.root}/store device=cpu"
        config = self.root.parent / "config.yaml"
        return ["main", f"--ckpt={ckpt}", f"--config={config}", f"--overrides={options}", f"--tracking-uri={self.uri}"]

    def measure(self, ckpt: str) -> int:
        """Starts a measurement, and gives its process id."""
        from pipeline.__main__ import main

        return start(lambda: main(self.command(ckpt)), self.root)

    def measured(self, ckpt: str) -> None:
        """Measures."""
        wait(self.measure(ckpt), self.root)


def start(work: Callable[[], int], folder: Path) -> int:
    """Does some work in a process of its own, as a program would, and gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)  # where MLflow keeps artifacts
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        code = work()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, folder: Path) -> None:
    """Until the process that was started in a folder has ended well."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        log = (folder / "log.txt").read_text()[-2000:]
        raise SystemExit(f"a program that nobody disturbed ended with {code}:\n{log}")


def prepare(folder: Path, models: int) -> list[str]:
    """Checkpoints and a task; imports what a measurement does. Nothing is computed in this process."""
    (folder / "config.yaml").write_text(CONFIG.format(data=Path("sample/data/proteins").absolute()))
    seen = Place(folder / "first")
    seen.root.mkdir()

    def first() -> int:
        import torch

        sys.path.insert(0, str(Path(__file__).parent))
        from transformers import EsmConfig, EsmModel

        from pipeline.__main__ import main
        from pipeline.encoders.esm import VOCABULARY, make_tokenizer

        for seed in range(models):
            torch.manual_seed(seed)
            size: dict[str, Any] = {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
            }
            tokens: dict[str, Any] = {"vocab_size": len(VOCABULARY), "pad_token_id": 1, "mask_token_id": 32}
            config = EsmConfig(**tokens, **size, position_embedding_type="rotary")
            EsmModel(config, add_pooling_layer=False).save_pretrained(folder / "models" / str(seed))
            make_tokenizer().save_pretrained(folder / "models" / str(seed))
        code = main(seen.command(str(folder / "models" / "0")))
        (folder / "modules.json").write_text(json.dumps(list(sys.modules)))
        return code

    wait(start(first, seen.root), seen.root)
    for name in json.loads((folder / "modules.json").read_text()):
        with contextlib.suppress(Exception):  # such as what a library makes up at run time
            importlib.import_module(name)
    from pipeline.store import writing

    writing.SHARD_TOKENS = SHARD_TOKENS
    return [str(folder / "models" / str(seed)) for seed in range(models)]


CONFIG = """
model:
  dwnstr_task_validation:
    dataset:
      - {{class: token, task_type: classification, task_name: structure, dataset_path: {data},
         dataset: {{train: x000, test: x000}}, target_column: [3state], target_sizes: [3], mask_column: [resolved],
         batch_size: 16, num_epochs: 2, max_rows: {{train: 32, test: 16}}}}
      - {{class: sequence, task_type: regression, task_name: stability, dataset_path: {data},
         dataset: {{train: x000, test: x000}}, target_column: stability,
         batch_size: 16, num_epochs: 2, max_rows: {{train: 32, test: 16}}}}
"""


def kill(place: Place, ckpts: Sequence[str], kills: int, length: float, seed: int, limit: float) -> int:
    """Starts programs and kills them, until that has been done `kills` times or `limit` seconds have passed.

    Returns:
        How many were killed; those that ended before their moment do not count.
    """
    draw, done, began = random.Random(seed), 0, time.monotonic()
    running: dict[int, float] = {}  # when each is to be killed
    while done < kills and time.monotonic() - began < limit:
        while len(running) < AT_ONCE:
            ckpt = ckpts[done * len(ckpts) // kills]
            running[place.measure(ckpt)] = time.monotonic() + draw.uniform(0, length)
        for pid, moment in list(running.items()):
            ended = os.waitpid(pid, os.WNOHANG)[0] == pid
            if not ended and time.monotonic() >= moment and done < kills:
                os.kill(pid, signal.SIGKILL)
                done += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
                ended = True
            if ended:
                del running[pid]
        time.sleep(0.002)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return done


def left(place: Place, temporary: Path) -> list[str]:
    """What programs have left behind, beside their results."""
    from mlflow import MlflowClient

    store = place.root / "store"
    found = [*store.glob("journal/*"), *store.glob("live/*"), *store.rglob("*.tmp")]
    found += [path for path in store.glob("heads/*") if path.suffix != ".safetensors"]
    for shelf in store.glob("embeddings/*"):
        counted = {shard["file"] for shard in json.loads((shelf / "manifest.json").read_text())["shards"]}
        found += [path for path in shelf.glob("shard-*") if path.name not in counted]
    found += [path for path in temporary.rglob("*") if path.parent != temporary or any(path.iterdir())]
    running = MlflowClient(place.uri).search_runs(["0"], "attributes.status = 'RUNNING'")
    return [str(path) for path in found] + [f"run {run.info.run_id} RUNNING" for run in running]


def results(place: Place) -> dict[str, Any]:
    """Scores and predictions of the last program, and all embeddings and heads of its store, by name."""
    found: dict[str, Any] = dict(_tracked(place))
    import pyarrow.parquet as pq

    for shelf in (place.root / "store" / "embeddings").iterdir():
        rows: dict[bytes, list[bytes]] = {}
        for path in sorted(shelf.glob("shard-*.parquet")):
            table = pq.read_table(path)
            for key, hidden in zip(table["key"].to_pylist(), table["hidden"].to_pylist(), strict=True):
                rows.setdefault(key, []).append(hidden)
        found[f"embeddings {shelf.name}"] = rows
    heads = (place.root / "store" / "heads").glob("*.safetensors")
    return found | {f"head {path.name}": path.read_bytes() for path in heads}


def _tracked(place: Place) -> Iterator[tuple[str, Any]]:
    """What MLflow has of the last program: of the run that was begun last, and of those nested in it."""
    import pyarrow.parquet as pq
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    client = MlflowClient(place.uri)
    runs = client.search_runs(["0"], order_by=["attributes.start_time DESC"], max_results=50_000)
    last = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    inner = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == last.info.run_id]
    for run in (last, *inner):
        for name, value in run.data.metrics.items():
            if name not in OF_THE_WAY and not name.startswith("peak_"):
                yield f"{run.info.run_name}: {name}", value
        for file in client.list_artifacts(run.info.run_id):
            if file.path.startswith("predictions"):
                path = download_artifacts(run_id=run.info.run_id, artifact_path=file.path, tracking_uri=place.uri)
                yield f"{run.info.run_name}: {file.path}", pq.read_table(path)


def main() -> int:
    """The exit code: 1 where a result differs, or something is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--models", type=int, default=8, help="checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1200.0, help="most seconds of killing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would go with the first child that ends well
    (folder / "tmp").mkdir()
    os.environ.update(ENVIRONMENT, TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None  # so that TMPDIR holds here too
    try:
        result = _run(folder, options)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result))
    return int(bool(result["left"] or result["differ"] or result["killed"] < options.kills))


def _run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    ckpts = prepare(folder, options.models)
    killed, undisturbed, first = (Place(folder / name) for name in ("killed", "undisturbed", "first"))
    for place in (killed, undisturbed):
        place.root.mkdir()
    pattern = str(folder / "models" / "*")
    undisturbed.measured(pattern)
    began = time.monotonic()
    first.measured(ckpts[-1])  # with a database that is there
    length = time.monotonic() - began
    done = kill(killed, ckpts[:1], options.kills // 20, length, options.seed, options.limit)
    killed.measured(ckpts[0])  # to make a database takes longer than all else: none would live to see one
    done += kill(killed, ckpts, options.kills - done, length, options.seed + 1, options.limit)
    seconds = time.monotonic() - began - length
    before = left(killed, folder / "tmp")
    killed.measured(pattern)
    after = left(killed, folder / "tmp")
    found, wanted = results(killed), results(undisturbed)
    return {
        "killed": done,
        "seconds of a program": round(length, 2),
        "seconds of killing": round(seconds),
        "left by the killed": len(before),
        "left": after,
        "compared": len(wanted),
        "differ": sorted(name for name in {*found, *wanted} if not _same(found.get(name), wanted.get(name))),
    }


def _same(one: Any, other: Any) -> bool:
    return bool(one.equals(other)) if hasattr(one, "equals") and hasattr(other, "equals") else bool(one == other)


if __name__ == "__main__":
    sys.exit(main())
