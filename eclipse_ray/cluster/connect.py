"""Connect to Ray, find what it has, and say clearly when that is not enough."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from eclipse_ray.config import Config
from eclipse_ray.errors import ConfigError, EclipseError, StorageError
from eclipse_ray.log import say

T = TypeVar("T")
_CONNECTING = threading.Lock()

# Both make Ray unpickle what it reads (Parquet tensor columns, WebDataset members): never, whoever asks.
UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)

MIN_RAY = (2, 59)
"""Older ones run code from a crafted Parquet file, or leave a fresh cluster open."""

# Ray only counts CPUs; on one machine, more than there are keep decoding and encoding moving beside the actors.
LOCAL_CPUS_PER_CORE = 2


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs of the cluster, or those an autoscaler may bring it to (run.max_cpus, run.max_gpus).

    `cores` are the CPUs of one machine to spread threads over. `nodes` are (CPUs, GPUs) of each machine; none:
    one has everything, or an autoscaler may add some that nobody knows yet.
    """

    cpus: int
    gpus: int
    cores: int
    local: bool
    nodes: tuple[tuple[float, float], ...] = ()

    @property
    def cpus_per_core(self) -> int:
        """Logical CPUs that stand for one real core."""
        return LOCAL_CPUS_PER_CORE if self.local else 1


def connect(config: Config) -> Resources:
    """Join the cluster at run.address or RAY_ADDRESS, else start one here, and return what it has or may get.

    Raises ConfigError if an environment variable asks Ray for unsafe deserialisation.
    """
    refuse_unsafe_environment()
    require_ray(ray.__version__, "here")
    cores = os.cpu_count() or 1
    address = address_of(config)
    # The demo evaluates on several threads, and two that start together would start two clusters.
    with _CONNECTING:
        if not ray.is_initialized():
            logging.getLogger("ray").setLevel(logging.WARNING)
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
            if address == "local":
                options |= {"num_cpus": LOCAL_CPUS_PER_CORE * cores, "include_dashboard": False}
                # It warns that the cluster it starts here is protected by a token.
                logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            with _own_sigterm(), _plain_failure(address):
                ray.init(address=address, **options)
    return _counted(ray.cluster_resources(), _nodes(), config, cores, address == "local")


def address_of(config: Config) -> str:
    """Return where the cluster is: run.address, else RAY_ADDRESS, else "local", one started here."""
    return config.run.address or os.environ.get("RAY_ADDRESS") or "local"


def _nodes() -> tuple[tuple[float, float], ...]:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple((float(each.get("CPU", 0)), float(each.get("GPU", 0))) for each in alive)


def _counted(
    present: dict[str, float], nodes: tuple[tuple[float, float], ...], config: Config, cores: int, local: bool
) -> Resources:
    """Return what is there or may come: work is sized by it and queued, so that an autoscaler adds nodes."""
    cpus, gpus = int(present.get("CPU", 0)), int(present.get("GPU", 0))
    if local:
        return Resources(cpus, gpus, cores, local, nodes)
    # The driver's own machine may be a small head on which nothing else runs.
    cores = max(1, int(max((here for here, _ in nodes), default=1)))
    may_have = max(cpus, config.run.max_cpus or 0), max(gpus, config.run.max_gpus or 0)
    return Resources(*may_have, cores, local, nodes if may_have == (cpus, gpus) else ())


def refuse_unsafe_environment() -> None:
    """Raise ConfigError if a variable makes Ray unpickle what it reads."""
    for variable in UNSAFE_VARIABLES:
        if os.environ.get(variable):
            raise ConfigError(f"{variable} is set: it lets untrusted data run code; unset it and run again")


def require_ray(version: str, where: str) -> None:
    """Raise ConfigError if a version of Ray is older than MIN_RAY."""
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_RAY:
        raise ConfigError(
            f"Ray {version} {where} is older than {'.'.join(map(str, MIN_RAY))}: it can be made to run code by "
            "the data it reads; update it"
        )


@contextmanager
def _plain_failure(address: str) -> Iterator[None]:
    """Say in one sentence that Ray cannot be started or joined. Raises EclipseError."""
    try:
        yield
    except EclipseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1].partition(". ")[0] if lines else type(error).__name__
        what = "a Ray cluster could not be started here" if address == "local" else f"{address}: cannot be joined"
        raise EclipseError(
            f"{what} ({reason}); run the same command again, or see what `eclipse-ray doctor` says"
        ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    # A Ray driver that starts its cluster takes this signal over, and would then not say that it can be resumed.
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def on_a_thread(fit: Callable[[], T], what: str) -> T:
    """Return what `fit` returns, run as by `on_threads`."""
    return on_threads([fit], 1, what)[0]


def on_threads(works: Sequence[Callable[[], T]], limit: int, what: str) -> list[T]:
    """Return what `works` return, run on `limit` threads; raises EclipseError when `what`, works of Ray's, stops.

    On the main thread Ray Train and Ray Tune take over SIGINT, and `ray.get` drops what a signal handler raises;
    here it stays free to be stopped.
    """
    numbers = iter(range(len(works)))
    done: dict[int, T] = {}
    failures: list[Exception] = []

    def work() -> None:
        try:
            for number in numbers:
                done[number] = works[number]()
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            failures.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limit, len(works)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(timeout=0.5)
    if failures and isinstance(failures[0], EclipseError):
        raise failures[0]
    if failures:
        raise EclipseError(f"{what} stopped: {message_of(failures[0])}; run the same command again to resume")
    return [done[number] for number in range(len(works))]


def message_of(error: BaseException) -> str:
    """Return what an error says, that of a worker without its trace."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return lines[-1] if lines else type(cause).__name__


def require_cpus(resources: Resources, needed: float, purpose: str) -> None:
    """Raise ConfigError when the cluster can never schedule the work, instead of a hang."""
    if resources.cpus < needed:
        raise ConfigError(
            f"{purpose} needs {needed:g} CPUs, the Ray cluster has {resources.cpus}; "
            "lower purify.actors or denoiser.num_workers, or add nodes"
        )
    free = ray.available_resources().get("CPU", 0) if ray.is_initialized() else needed
    if free < needed:
        say(f"note: {free:g} of {resources.cpus} CPUs are free now; {purpose} needs {needed:g} and waits for them")


def require_gpus(resources: Resources, needed: float, setting: str) -> None:
    """Raise ConfigError when the cluster has not so many GPUs; `setting` says what asks for them."""
    if resources.gpus < needed:
        raise ConfigError(f"{setting} needs {needed:g} GPUs, the Ray cluster has {resources.gpus}; add nodes")


def require_place(resources: Resources, cpus: float, gpus: float, purpose: str) -> None:
    """Raise ConfigError when no machine is large enough for one task of so many CPUs and GPUs."""
    nodes = resources.nodes or ((resources.cpus, resources.gpus),)
    if not any(cpus <= has_cpus and gpus <= has_gpus for has_cpus, has_gpus in nodes):
        largest = ", ".join(f"{has_cpus:g} and {has_gpus:g}" for has_cpus, has_gpus in sorted(set(nodes)))
        raise ConfigError(
            f"{purpose} needs {cpus:g} CPUs and {gpus:g} GPUs on one machine; "
            f"those of the Ray cluster have {largest}"
        )


def refuse_process_local(url: str, in_this_process_only: bool) -> None:
    """Raise StorageError for memory:// locations, which Ray's other processes cannot see."""
    if in_this_process_only:
        raise StorageError(f"{url}: lives in this process alone, Ray workers cannot see it; use a folder or S3")
