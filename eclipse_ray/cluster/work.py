"""Work on Ray: the only place that waits for it, with time-outs, errors that keep their type, and progress.

Everything here waits for Ray on a thread of its own, so that a program's main thread is free for Ctrl-C: `ray.get`
drops what a signal handler raises, and Ray Train and Ray Tune take SIGINT over.
"""

from __future__ import annotations

import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import ray
from ray import exceptions
from ray.actor import ActorHandle

from eclipse_ray.cluster.connect import Resources, address_of, require_gpus
from eclipse_ray.config import Config
from eclipse_ray.errors import EclipseError, InterruptedRunError, error_of_note, note_of_error

T = TypeVar("T")

PATIENCE = 10
"""The next result may take this many times as long as the slowest one yet before the work is taken for dead."""
LOOK_SECONDS = 0.5
"""Seconds between two looks at a board, or at whether the time is over."""
SETTLE_SECONDS = 10
"""How long the end of work waits for its last progress, which a board that is being started again may lose."""


class Watch:
    """How long to wait for work: `what` it is called, and the `unit` that is finished, in sentences.

    Work that gives no sign of life for `seconds` is given up: `on_hang` is called, InterruptedRunError is raised.
    Signs of life are results, and entries of the board that a `BoardWatcher` reads for this watch.
    """

    def __init__(
        self, what: str, unit: str, seconds: float = math.inf, on_hang: Callable[[], None] = lambda: None
    ) -> None:
        self.what, self.unit, self.seconds, self.on_hang = what, unit, seconds, on_hang
        self.last, self.slowest = time.monotonic(), -1.0

    @property
    def limit(self) -> float:
        """Seconds that the next sign of life may take."""
        return max(self.seconds, PATIENCE * self.slowest)

    def beat(self) -> None:
        """Take note of a sign of life."""
        now = time.monotonic()
        # The first one also waits for workers to start, which says nothing of how long a result takes.
        self.slowest = 0.0 if self.slowest < 0 else max(self.slowest, now - self.last)
        self.last = now

    def resume(self) -> None:
        """Start the clock again after a pause in which nobody waited."""
        self.last = time.monotonic()

    def check(self) -> None:
        """Raise InterruptedRunError if there was no sign of life for too long."""
        if time.monotonic() - self.last > self.limit:
            self.on_hang()
            raise InterruptedRunError(
                f"{self.what} stopped: no {self.unit} was finished for {self.limit:.0f} s (run.watchdog_seconds), "
                "so a worker hangs or was lost; run the same command again to resume"
            )


def watched(results: Iterator[T], watch: Watch) -> Iterator[T]:
    """Yield results as they come, such as those of a Ray Data stream.

    Raises InterruptedRunError when none comes for too long or Ray gives up, and a worker's EclipseError as it is.
    """
    ready: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue(1)
    abandoned = threading.Event()
    watch.resume()
    threading.Thread(target=_forward, args=(results, ready, abandoned), daemon=True).start()
    try:
        while True:
            try:
                result, error = ready.get(timeout=min(LOOK_SECONDS, watch.limit))
            except queue.Empty:
                watch.check()
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                home = brought_home(error, watch.what)
                if home is not error:
                    home.__cause__ = error
                raise home
            watch.beat()
            yield result  # type: ignore[misc]
            watch.resume()
    finally:
        abandoned.set()


def _forward(results: Iterator[T], ready: queue.Queue[Any], abandoned: threading.Event) -> None:
    """Put each result, then the error that ended them, for as long as somebody waits for them."""
    error = None
    while error is None and not abandoned.is_set():
        result = None
        try:
            result = next(results)
        except Exception as raised:  # noqa: BLE001 - handed to the thread that waits, which raises it
            error = raised
        while not abandoned.is_set():
            try:
                ready.put((result, error), timeout=LOOK_SECONDS)
                break
            except queue.Full:
                continue
    close = getattr(results, "close", None)
    if close is not None:
        close()


def on_a_thread(work: Callable[[], T], watch: Watch | str) -> T:
    """Return what a blocking call returns, such as the fit of Ray Train; see `on_threads`."""
    return on_threads([work], 1, watch)[0]


def on_threads(works: Sequence[Callable[[], T]], limit: int, watch: Watch | str) -> list[T]:
    """Return what blocking calls return, in order, run on `limit` threads of this process.

    `watch` may be the name of the work, which then may take any time. Raises what `watched` raises.
    """
    watch = Watch(watch, "part") if isinstance(watch, str) else watch
    found = dict(watched(_threaded(works, limit), watch))
    return [found[number] for number in range(len(works))]


def _threaded(works: Sequence[Callable[[], T]], limit: int) -> Iterator[tuple[int, T]]:
    done: queue.SimpleQueue[tuple[int, Future[T]]] = queue.SimpleQueue()
    numbers = iter(range(len(works)))

    def work() -> None:
        for number in numbers:
            result: Future[T] = Future()
            try:
                result.set_result(works[number]())
            except Exception as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
                result.set_exception(error)
            done.put((number, result))
            if result.exception():
                return

    for _ in range(min(limit, len(works))):
        threading.Thread(target=work, daemon=True).start()
    # In the order in which they end, so that the first error is the one that is raised.
    for _ in works:
        number, result = done.get()
        yield number, result.result()


@dataclass(frozen=True)
class Tasks:
    """A function that runs as a Ray task: its CPUs and GPUs, and how many tasks are under way at once.

    A task whose worker dies is begun again `retries` times.
    """

    function: Callable[..., Any]
    at_once: int
    cpus: float = 1
    gpus: float = 0
    retries: int = 3


@dataclass(frozen=True)
class Done:
    """A task that has ended: the number of its arguments, a reference to its result, and its error or None."""

    number: int
    reference: Any
    error: EclipseError | None

    def value(self) -> Any:
        """Return what the task returned. Raises its error."""
        if self.error is not None:
            raise self.error
        return ray.get(self.reference)


def run_tasks(
    tasks: Tasks, arguments: Iterable[tuple[Any, ...]], watch: Watch, *, in_order: bool = False
) -> Iterator[Done]:
    """Yield a `Done` for each tuple of arguments, as tasks end or in the order of the arguments.

    Arguments that are references arrive as values. An error of a task is in its `Done`; raises InterruptedRunError
    when no task ends for too long. Tasks still under way when nobody waits any more are cancelled.
    """
    pending: dict[Any, tuple[int, Any]] = {}
    try:
        yield from watched(_run_tasks(tasks, arguments, watch.what, in_order, pending), watch)
    finally:
        for note in list(pending):
            ray.cancel(note, force=True)


def _run_tasks(
    tasks: Tasks,
    arguments: Iterable[tuple[Any, ...]],
    what: str,
    in_order: bool,
    pending: dict[Any, tuple[int, Any]],
) -> Iterator[Done]:
    share = {"num_cpus": tasks.cpus, "num_gpus": tasks.gpus, "max_retries": tasks.retries}
    remote = ray.remote(num_returns=2, **share)(_noted).options(name=tasks.function.__name__)
    function, left = ray.put(tasks.function), enumerate(arguments)
    while True:
        while len(pending) < tasks.at_once and (given := next(left, None)) is not None:
            note, reference = remote.remote(function, *given[1])
            pending[note] = (given[0], reference)
        if not pending:
            return
        oldest = next(iter(pending))
        (note,), _ = ray.wait([oldest] if in_order else list(pending), num_returns=1)
        number, reference = pending.pop(note)
        yield Done(number, reference, _error_of_task(note, what))


def _noted(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    # Ray would wrap an error for people into its own class and a stack of calls.
    try:
        return "", function(*arguments)
    except EclipseError as error:
        return note_of_error(error), None
    finally:
        settle(*arguments)


def _error_of_task(note: Any, what: str) -> EclipseError | None:
    try:
        text = ray.get(note)
    except exceptions.RayError as error:
        return brought_home(error, what)
    return error_of_note(text) if text else None


LOSSES: tuple[tuple[type[BaseException], str], ...] = (
    (exceptions.OutOfMemoryError, "a worker was stopped because its machine ran out of memory"),
    (exceptions.NodeDiedError, "a machine of the cluster was lost"),
    (exceptions.RayActorError, "a worker process ended"),
    (exceptions.WorkerCrashedError, "a worker process ended"),
    (exceptions.ObjectLostError, "data on a machine that was lost are gone"),
    (exceptions.OutOfDiskError, "a machine of the cluster has no disk space left"),
)
"""Errors of Ray whose own text is several paragraphs, and what they mean."""


def brought_home(error: BaseException, what: str) -> EclipseError:
    """Return the EclipseError that a worker raised, whatever Ray wraps around it.

    Of any other error, return an InterruptedRunError whose sentence says that `what` stopped and why.
    """
    for cause in _causes(error):
        if isinstance(cause, EclipseError) and not isinstance(cause, exceptions.RayError):
            return cause
    return InterruptedRunError(f"{what} stopped: {message_of(error)}; run the same command again to resume")


def message_of(error: BaseException) -> str:
    """Return what an error says in one line, that of a worker without its trace."""
    causes = list(_causes(error))
    for cause in causes:
        for kind, sentence in LOSSES:
            if isinstance(cause, kind):
                return sentence
    lines = str(causes[-1]).strip().splitlines()
    return lines[-1] if lines else type(causes[-1]).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, then what it wraps, the innermost last: of Ray's tasks, of Ray Train, and of Python."""
    seen: list[BaseException] = []
    inner: BaseException | None = error
    while isinstance(inner, BaseException) and inner not in seen:
        seen.append(inner)
        yield inner
        failures = list((getattr(inner, "worker_failures", None) or {}).values())
        wrapped = (getattr(inner, name, None) for name in ("cause", "controller_failure", "_base_exc"))
        inner = next((one for one in (*failures, *wrapped) if isinstance(one, BaseException)), None)


def reaching(config: Config) -> str:
    """Return what is done first, for people who wait for it."""
    return "starting Ray" if address_of(config) == "local" else "joining the cluster"


class Board:
    """Where workers leave their latest progress, and the driver takes it from. It runs as an actor."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def post(self, entry: dict[str, Any]) -> None:
        """Add an entry."""
        self.entries.append(entry)

    def take(self) -> list[dict[str, Any]]:
        """Return the entries since the last call."""
        entries, self.entries = self.entries, []
        return entries


def start_board(name: str | None = None) -> Any:
    """Return the handle of a Board: an actor without a CPU, which is started again if its machine is lost."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).options(name=name).remote()


def settle(*arguments: Any) -> None:
    """Wait until the boards among `arguments` have what this process posted; nobody looks again later."""
    for board in arguments:
        if isinstance(board, ActorHandle):
            # Calls of one process arrive in order.
            ray.wait([board.__ray_ready__.remote()], timeout=SETTLE_SECONDS)


class NamedActor:
    """Stands for the handle of an actor and finds it by name, so that no reference travels with a call."""

    def __init__(self, name: str, namespace: str | None = None) -> None:
        self._name, self._namespace = name, namespace

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return getattr(ray.get_actor(self._name, self._namespace), method)


def pass_by_value() -> None:
    """Let Ray Data start actors without references, so that one can be started again whatever else is lost.

    It passes an operator's function, its settings and a tracker by reference to the object store
    (ray-project/ray#53727), and has no setting for this. Ours are small enough to travel with the call.
    """
    from ray.data._internal.execution.operators import actor_pool_map_operator

    for name, value in (("_map_transformer_ref", "_map_transformer"), ("_data_context_ref", "data_context")):
        setattr(actor_pool_map_operator.ActorPoolMapOperator, name, property(attrgetter(value)))
    actor_pool_map_operator.get_or_create_actor_location_tracker = _tracker


def _tracker() -> NamedActor:
    from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker

    get_or_create_actor_location_tracker()
    return NamedActor("ActorLocationTracker", "ActorLocationTracker")


class BoardWatcher:
    """Hands each new entry of a board to a function, on a thread, while a `with` block runs.

    Entries are signs of life for `watch`.
    """

    def __init__(self, board: Any, on_entry: Callable[[dict[str, Any]], None], watch: Watch | None = None) -> None:
        self.board, self.on_entry, self.watch = board, on_entry, watch
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> BoardWatcher:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        # A driver that is stopped has no time for the last entries.
        self.thread.join(timeout=SETTLE_SECONDS if exception[0] is None else 0)

    def _read(self) -> None:
        finished = False
        while not finished:
            # One look after the end, so that the last entries are seen too.
            finished = self.stop.wait(LOOK_SECONDS)
            try:
                entries = ray.get(self.board.take.remote())
            except exceptions.RayError:
                # The work itself says what was lost.
                continue
            for entry in entries:
                self.on_entry(entry)
                if self.watch is not None:
                    self.watch.beat()


RETRIES = 2
"""How often a trial whose process died is begun again."""
GPU_SHARE = 0.25
"""Part of a GPU that a trial takes unless told otherwise."""


def shares(num_gpus: float | None, max_concurrent: int | None, resources: Resources) -> tuple[float, int, int]:
    """Return (GPUs of a trial, trials at once, CPU threads of each); one thread unless fewer trials are asked for.

    The threads do not depend on how many trials are left, because floats summed by other threads differ. Raises
    ConfigError for GPUs where there are none.
    """
    require_gpus(resources, num_gpus or 0, f"num_gpus={num_gpus} of a trial")
    if resources.gpus and num_gpus != 0:
        gpus = num_gpus or GPU_SHARE
        room = max(1, int(resources.gpus / gpus))
        return gpus, min(room, max_concurrent or room), 1
    cores = resources.cores if resources.local else resources.cpus
    concurrent = min(cores, max_concurrent or cores)
    return 0.0, concurrent, max(1, resources.cores // concurrent)


def run_trials(
    trainable: Any,
    space: dict[str, Any],
    resources: dict[str, float],
    tune_config: Any,
    watch: Watch,
    callbacks: Sequence[Any] = (),
) -> list[tuple[dict[str, Any], str]]:
    """Run the trials of Ray Tune to their end; return the point and the message of each that failed.

    A trial that fails by itself reports a metric `error`; one whose process died is begun again RETRIES times.
    Raises InterruptedRunError when Ray Tune itself stops, or `watch` sees no sign of life for too long.
    """
    from ray import tune

    _quiet_tune()
    # Dead workers may still write there when it is deleted; nothing of Tune's is read again.
    with tempfile.TemporaryDirectory(prefix="eclipse-ray-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space=space,
            tune_config=tune_config,
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                callbacks=list(callbacks),
            ),
        )
        outcome = on_a_thread(tuner.fit, watch)
    said = [(one, (one.metrics or {}).get("error")) for one in outcome]
    return [
        (one.config, message or message_of(one.error)) for one, message in said if message or one.error is not None
    ]


def _quiet_tune() -> None:
    """Keep Ray Tune from writing and saying what nobody reads: the board tells of every trial."""
    # A CSV and a JSON file for each trial.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # A box with its own settings and the name of a folder that is gone afterwards, which verbose=0 lets pass.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
