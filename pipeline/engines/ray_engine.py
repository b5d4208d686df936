"""Ray, where one process is not enough: an object that lives in other processes, and jobs that run there.

Ray is imported here and nowhere else, and not before it is asked for. Nothing here knows a stage: what runs elsewhere
is a function, with arguments and a result that can be pickled.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.engines.elsewhere import Answer, Heard, Settings
from pipeline.engines.workers import Alone
from pipeline.errors import ConfigError, EngineError

T = TypeVar("T")
J = TypeVar("J")
logger = logging.getLogger(__name__)

TRIES = 3  # of work whose process has ended, after the first
GROUP_BYTES = 2**14  # of items that go to a process together: each group costs Ray some milliseconds
LOST = "see Ray's own log; where memory was short, set ray.workers or max_batch_tokens lower"


@dataclass(frozen=True)
class Needs:
    """What each of the worker processes takes.

    Attributes:
        threads: of its own, and processors.
        gpus: a part of one too; None for one where the cluster has any.
        most: workers at once; None for as many as there is room for.
    """

    threads: int
    gpus: float | None = None
    most: int | None = None


@contextmanager
def connected(needs: Needs) -> Iterator[RayEngine]:
    """Joins the cluster that `RAY_ADDRESS` names, or starts Ray here, which then ends with this.

    A connection that this process has already is used, and stays.

    Raises:
        ConfigError: Ray is not installed, or no machine has what a worker takes.
        EngineError: the cluster cannot be reached.
    """
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _join(ray)
    try:
        engine = RayEngine(ray, needs)
        yield engine
        engine.release()
    finally:
        if own:
            ray.shutdown()


def _ray() -> Any:
    """The library, which then tells nobody that it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"engine: expected the package ray, found: {error}; pip install 'downstream-validation[ray]'"
        ) from error
    return ray


def _join(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS") or "local"
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    logging.getLogger("ray").setLevel(logging.ERROR)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:
        raise EngineError(
            f"engine: Ray at '{address}' cannot be reached ({type(error).__name__}: {error}); "
            "set RAY_ADDRESS to a cluster that runs, or leave it out to start Ray on this machine"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RayEngine(Alone):
    """Has work done by processes that Ray starts, each with the same threads and arithmetic as this one.

    To the stages it is one worker, which gives jobs away. A process that ends before its work is done is started again,
    and the work with it. What its code logs is said here, and an error of its code is raised here as it was there.

    Attributes:
        workers: how many there may be at once.
        gpus: of each.
    """

    shares = True

    def __init__(self, ray: Any, needs: Needs) -> None:
        """Uses a connection that is there. Raises ConfigError where no machine has what a worker takes."""
        self._ray = ray
        self._host: Host[Any] | None = None
        self._heard = Heard()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = needs.gpus if needs.gpus is not None else float(any(node.get("GPU", 0) for node in nodes))
        self.gpus = gpus
        self._takes = {"num_cpus": needs.threads, "num_gpus": gpus}
        room = sum(_room(node, needs.threads, gpus) for node in nodes)
        if not room:
            raise ConfigError(
                f"ray: expected a machine with {needs.threads} processors and {gpus:g} GPUs for a worker, "
                f"found {' and '.join(map(_words, nodes)) or 'no machine'}; set ray.threads, ray.gpus or device"
            )
        self.workers = min(room, needs.most or room)
        self._settings = Settings.of_this_process(needs.threads)

    def __str__(self) -> str:
        of_each = f"{self._settings.threads} threads" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
        return f"up to {self.workers} workers of {of_each}"

    def host(self, make: Callable[[], T]) -> Host[T]:
        """A process with the object that `make` makes there. It ends the one before: there may be room for one."""
        self.release()
        self._host = Host(self._ray, make, self._settings, self._takes, self._heard)
        return self._host

    def release(self) -> None:
        """Ends the process of `host`, which is started again when it is needed."""
        if self._host is not None:
            self._host.end()

    def stream(self, make: Callable[[], T], work: Callable[[T, J], Any], items: Iterable[J]) -> Iterator[Any]:
        """What `work` gives for the object that `make` makes, and for each item, in order, as it comes.

        A pool of processes, each with an object of its own, takes the items in groups. No more are ahead of whoever
        reads here than Ray Data keeps in its object store.

        Raises:
            PipelineError: of `make` or `work`.
            EngineError: a process ended again and again.
        """
        self.release()
        dumps = self._ray.cloudpickle.dumps
        groups = [{"number": number, "group": group} for number, group in enumerate(_grouped(map(dumps, items)))]
        tries = self._ray.remote(num_cpus=0)(_Tries).remote()
        data = self._ray.data.from_items(groups, override_num_blocks=len(groups))
        size = min(self.workers, len(groups))
        found = data.map_batches(
            _Pooled,
            fn_constructor_args=(dumps((make, work, self._settings)), tries),
            compute=self._ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            batch_size=None,
            batch_format="pyarrow",
            **self._takes,
        )
        _set_up(found.context)
        with self._losses():
            for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                for one in batch["found"]:
                    for result in pickle.loads(one.as_buffer()):  # noqa: S301  # from a process of this program
                        yield self._heard.value(result)

    def each(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float] = ()) -> list[T]:
        """See `Workers.each`.

        Raises:
            PipelineError: of `work`.
            EngineError: a process ended again and again.
        """
        return [self._heard.value(one) for one in self.answers(work, jobs, costs)]

    def answers(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float] = ()) -> Iterator[Answer]:
        """As `each`, with an answer for each job, which may be an error, as soon as those before it are there."""
        self.release()
        ask = self._ray.remote(max_retries=TRIES, **self._takes)(_done)
        shared = self._ray.put(self._ray.cloudpickle.dumps((work, self._settings)))
        waiting = sorted(range(len(jobs)), key=lambda place: -costs[place] if costs else place)
        running: dict[Any, int] = {}
        done: dict[int, Answer] = {}
        try:
            for place in range(len(jobs)):
                while place not in done:
                    while waiting and len(running) < self.workers:
                        job = waiting.pop(0)
                        running[ask.remote(shared, jobs[job])] = job
                    (ready,), _ = self._ray.wait(list(running), num_returns=1)
                    done[running.pop(ready)] = self._answer_of(ready)
                yield done.pop(place)
        finally:
            for one in running:
                with suppress(Exception):
                    self._ray.cancel(one, force=True)

    def _answer_of(self, ready: Any) -> Answer:
        try:
            with self._losses():
                found: Answer = self._ray.get(ready)
        except EngineError as error:
            return Answer(error=error)
        return found

    @contextmanager
    def _losses(self) -> Iterator[None]:
        with _losses(self._ray):
            yield


class Host(Generic[T]):
    """A process with an object in it, which answers questions."""

    def __init__(
        self, ray: Any, make: Callable[[], T], settings: Settings, takes: dict[str, Any], heard: Heard
    ) -> None:
        """It is started with the first question, and again with the first after `end`."""
        self._ray, self._heard = ray, heard
        self._class = ray.remote(max_restarts=TRIES, max_task_retries=TRIES, **takes)(_Hosted)
        self._arguments = ray.cloudpickle.dumps((make, settings))
        self._actor: Any = None

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """What `question` gives for the object and the arguments. Raises what that did, or `make`."""
        with _losses(self._ray):
            if self._actor is None:
                self._actor = self._class.remote(self._arguments)
            found = self._ray.get(self._actor.ask.remote(self._ray.cloudpickle.dumps((question, arguments))))
        return self._heard.value(found)

    def end(self) -> None:
        """Ends the process."""
        if self._actor is not None:
            self._ray.kill(self._actor)
        self._actor = None


class _Hosted:
    """The object of `Host`, in its own process."""

    def __init__(self, arguments: bytes) -> None:
        make, self._settings = pickle.loads(arguments)  # noqa: S301  # from the program that started this process
        self._made = self._settings.run(make)

    def ask(self, arguments: bytes) -> Answer:
        question, values = pickle.loads(arguments)  # noqa: S301  # as above
        found: Answer = self._made.then(self._settings, lambda made: question(made, *values))
        return found


class _Pooled:
    """The object of `RayEngine.stream`, in each process of the pool."""

    def __init__(self, arguments: bytes, tries: Any) -> None:
        make, self._work, self._settings = pickle.loads(arguments)  # noqa: S301  # from the program that started it
        self._tries = tries
        self._made = self._settings.run(make)

    def __call__(self, groups: Any) -> Any:
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


class _Tries:
    """Counts how often each group was begun: Ray Data itself would begin it without an end."""

    def __init__(self) -> None:
        self._begun = Counter[int]()

    def of(self, number: int) -> int:
        """Counts, and gives, those of a group."""
        self._begun[number] += 1
        return self._begun[number]


def _done(arguments: bytes, job: Any) -> Answer:
    """A job of `RayEngine.answers`, in a process of its own."""
    work, settings = pickle.loads(arguments)  # noqa: S301  # from the program that started this process
    found: Answer = settings.run(lambda: work(job))
    return found


def _grouped(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for item in items:
        if group and sum(map(len, group)) + len(item) > GROUP_BYTES:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _set_up(context: Any) -> None:
    """Sets how Ray Data runs a data set: results are in the order of the items; nothing is printed."""
    context.execution_options.preserve_order = True
    context.max_consecutive_actor_init_deaths = TRIES
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _losses(ray: Any) -> Iterator[None]:
    """Turns an error of Ray's into an EngineError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        what = next((line for line in str(error).splitlines() if line.strip()), "")
        raise EngineError(f"engine: Ray gave up: {type(error).__name__}: {what[:300]}; {LOST}") from error


def _room(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers find room on a machine."""
    by_cpus = int(node.get("CPU", 0) // cpus)
    return min(by_cpus, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpus


def _words(node: Mapping[str, float]) -> str:
    return f"one with {node.get('CPU', 0):g} and {node.get('GPU', 0):g}"
