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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from pipeline.engines.elsewhere import Answer, Heard, Settings
from pipeline.engines.ray_worker import LOST, TRIES, Hosted, Pooled, Tries, done
from pipeline.engines.workers import Alone
from pipeline.errors import ConfigError, EngineError

T = TypeVar("T")
J = TypeVar("J")
logger = logging.getLogger(__name__)

GROUP_BYTES = 2**14  # of items that go to a process together, at most: each group costs Ray some milliseconds
GROUPS = 4  # of each process, at least, so that all end at about the same time


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
    with ExitStack() as stack:
        if own:
            stack.callback(ray.shutdown)
        engine = RayEngine(ray, needs)
        stack.callback(engine.release)
        yield engine


def _ray() -> Any:
    """The library, which then tells nobody that it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # it would replace the program's `print`, and leave it so
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
        self.ray = ray
        self._host: Host | None = None
        self.heard = Heard()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = needs.gpus if needs.gpus is not None else float(any(node.get("GPU", 0) for node in nodes))
        self.gpus = gpus
        self.takes = {"num_cpus": needs.threads, "num_gpus": gpus}
        room = sum(_room(node, needs.threads, gpus) for node in nodes)
        if not room:
            raise ConfigError(
                f"ray: expected a machine with {needs.threads} processors and {gpus:g} GPUs for a worker, "
                f"found {' and '.join(map(_words, nodes)) or 'no machine'}; set ray.threads, ray.gpus or device"
            )
        self.workers = min(room, needs.most or room)
        self.settings = Settings.of_this_process(needs.threads)

    def __str__(self) -> str:
        of_each = f"{self.settings.threads} threads" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
        return f"up to {self.workers} workers of {of_each}"

    def host(self, make: Callable[[], Any]) -> Host:
        """A process with the object that `make` makes there, from its first question on."""
        return Host(self, make)

    def release(self, following: Host | None = None) -> None:
        """Ends the process of a host, since there may be room for one alone: of `following`, or of other work.

        It is started again with its next question.
        """
        if self._host is not None:
            self._host.end()
        self._host = following

    def stream(self, make: Callable[[], T], work: Callable[[T, J], Any], items: Iterable[J]) -> Iterator[Any]:
        """What `work` gives for the object that `make` makes, and for each item, in order, as it comes.

        A pool of processes, each with an object of its own, takes the items in groups. No more are ahead of whoever
        reads here than Ray Data keeps in its object store.

        Raises:
            PipelineError: of `make` or `work`.
            EngineError: a process ended again and again.
        """
        self.release()
        dumps = self.ray.cloudpickle.dumps
        pickled = [dumps(item) for item in items]
        most = min(GROUP_BYTES, sum(map(len, pickled)) // (GROUPS * self.workers))
        groups = [{"number": number, "group": group} for number, group in enumerate(_grouped(pickled, most))]
        tries = self.ray.remote(num_cpus=0)(Tries).remote()
        data = self.ray.data.from_items(groups, override_num_blocks=len(groups))
        size = min(self.workers, len(groups))
        found = data.map_batches(
            Pooled,
            fn_constructor_args=(dumps((make, work, self.settings)), tries),
            compute=self.ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            batch_size=None,
            batch_format="pyarrow",
            **self.takes,
        )
        _set_up(found.context)
        tables = iter(found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        with closing(tables), self.losses():
            for one in chain.from_iterable(table["found"] for table in tables):
                for result in pickle.loads(one.as_buffer()):  # noqa: S301  # from a process of this program
                    yield self.heard.value(result)

    def each(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float] = ()) -> list[T]:
        """See `Workers.each`.

        Raises:
            PipelineError: of `work`.
            EngineError: a process ended again and again.
        """
        return [self.heard.value(one) for one in self.answers(work, jobs, costs)]

    def answers(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float] = ()) -> Iterator[Answer]:
        """As `each`, with an answer for each job, which may be an error, as soon as those before it are there.

        Where the cluster is lost, that is the answer for every job that is left. No more answers are kept here than
        there are workers, where jobs have no costs and so are begun in order.
        """
        self.release()
        ask = self.ray.remote(max_retries=TRIES, **self.takes)(done)
        shared = self.ray.put(self.ray.cloudpickle.dumps((work, self.settings)))
        waiting = sorted(range(len(jobs)), key=lambda place: -costs[place] if costs else place)
        running: dict[Any, int] = {}
        found: dict[int, Answer] = {}
        most = len(jobs) if costs else self.workers  # of answers that wait for their turn
        lost: Answer | None = None

        def await_one() -> None:
            while waiting and len(running) < self.workers and len(found) <= most:
                job = waiting.pop(0)
                running[ask.remote(shared, jobs[job])] = job
            (ready,), _ = self.ray.wait(list(running), num_returns=1)
            found[running.pop(ready)] = self._answer_of(ready)

        try:
            for place in range(len(jobs)):
                while place not in found and lost is None:
                    lost = self._lost(await_one)
                yield found.pop(place, lost or Answer())
        finally:
            for one in running:
                with suppress(Exception):
                    self.ray.cancel(one, force=True)

    def _lost(self, act: Callable[[], None]) -> Answer | None:
        """Does something with Ray. The answer to give where that fails, as with a cluster that is gone."""
        try:
            with self.losses():
                act()
        except Exception as error:
            return Answer(error=error)
        return None

    def _answer_of(self, ready: Any) -> Answer:
        try:
            with self.losses():
                answer: Answer = self.ray.get(ready)
        except EngineError as error:
            return Answer(error=error)
        return answer

    @contextmanager
    def losses(self) -> Iterator[None]:
        """Turns an error of Ray's into an EngineError."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or [""]
            what = " ... ".join(dict.fromkeys([lines[0], lines[-1]]))  # what was lost, and the last of a traceback
            raise EngineError(f"engine: Ray gave up: {type(error).__name__}: {what}; {LOST}") from error


class Host:
    """A process with an object in it, which answers questions."""

    def __init__(self, engine: RayEngine, make: Callable[[], Any]) -> None:
        """It is started with the first question, and again with the first after `end`."""
        self._engine = engine
        self._actor: Any = None
        self._class = engine.ray.remote(max_restarts=TRIES, max_task_retries=TRIES, **engine.takes)(Hosted)
        self._arguments = engine.ray.cloudpickle.dumps((make, engine.settings))

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """What `question` gives for the object and the arguments. Raises what that did, or `make`."""
        ray = self._engine.ray
        if self._actor is None:
            self._engine.release(self)
            self._actor = self._class.remote(self._arguments)
        with self._engine.losses():
            found = ray.get(self._actor.ask.remote(ray.cloudpickle.dumps((question, arguments))))
        return self._engine.heard.value(found)

    def end(self) -> None:
        """Ends the process."""
        if self._actor is not None:
            with suppress(Exception):  # the cluster may be lost, and the process with it
                self._engine.ray.kill(self._actor)
        self._actor = None


def _grouped(items: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    """The items in their order, in groups of at most that many bytes, or of one item."""
    group: list[bytes] = []
    for item in items:
        if group and sum(map(len, group)) + len(item) > most:
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


def _room(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """How many workers find room on a machine."""
    by_cpus = int(node.get("CPU", 0) // cpus)
    return min(by_cpus, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpus


def _words(node: Mapping[str, float]) -> str:
    return f"one with {node.get('CPU', 0):g} and {node.get('GPU', 0):g}"
