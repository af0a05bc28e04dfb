"""Connect to Ray, find what it has and whether that is enough, and bring a denoiser to the node that needs it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

import ray
from ray._private.node import Node
from ray._private.services import canonicalize_bootstrap_address

from eclipse_ray.config import Config
from eclipse_ray.contact import ANSWER_SECONDS, first_contact
from eclipse_ray.errors import (
    ConfigError,
    EclipseError,
    InputError,
    InterruptedRunError,
    StorageError,
    did_you_mean,
)
from eclipse_ray.log import listen, say
from eclipse_ray.progress import duration
from eclipse_ray.storage.store import Store

if TYPE_CHECKING:
    from eclipse_ray.config import Computed
    from eclipse_ray.diffusion.network import Denoiser
    from eclipse_ray.diffusion.sampling import Trained

_CONNECTING = threading.Lock()

# Both make Ray unpickle what it reads (Parquet tensor columns, WebDataset members), which is never allowed.
UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)

MIN_RAY = (2, 59)
"""Older ones run code from a crafted Parquet file, or leave a fresh cluster open."""

# Ray only counts CPUs. On one machine it is told of more than there are, so that decoding runs beside the actors.
LOCAL_CPUS_PER_CORE = 2
# How a client of HTTP/2, and so of gRPC, begins; the server sends its own settings at once, or refuses.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
NICENESS = "RAY_worker_niceness"
"""By how much workers yield to the command that starts their cluster; 15 where Ray is left to itself."""
PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether a training has a process that hears when a node is to be taken away, as clouds take spot machines."""
STARTS = 3
"""How often a cluster of our own is started before that is given up."""
TOO_SLOW = "timed out during startup"
"""What Ray says of a cluster that was not up in time."""


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
            listen("ray", "ray.data")
        with _plain_failure(config, address):
            if address != "local":
                first_contact(f"the Ray cluster at {address} to answer", lambda: _join(address))
            elif not ray.is_initialized():
                _start(cores)
    return _counted(ray.cluster_resources(), _nodes(), config, cores, address == "local")


def _start(cores: int) -> None:
    os.environ.setdefault(NICENESS, "0")
    # Nobody takes this machine away, and each process of a training imports torch before it begins.
    os.environ.setdefault(PREEMPTION, "0")
    for left in reversed(range(STARTS)):
        began = time.monotonic()
        try:
            with _own_sigterm():
                ray.init(
                    address="local",
                    num_cpus=LOCAL_CPUS_PER_CORE * cores,
                    include_dashboard=False,
                    log_to_driver=False,
                )
            return
        except Exception as error:
            _end_processes(error)
            # Ray gives each of its own processes 15 seconds, which may be too few beside other programs.
            if not left or TOO_SLOW not in str(error):
                raise
            gone = duration(time.monotonic() - began)
            say(f"note: Ray did not start within {gone}{busy(cores)}; trying again")


def _end_processes(error: Exception) -> None:
    """End what belongs to a cluster that failed to start: Ray lets it run on, beside the next one."""
    for frame, _ in walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, wait=True)


def busy(cores: int) -> str:
    """Return a clause that says that other programs keep this machine busy, "" if they do not."""
    load = os.getloadavg()[0]
    return f", with a load of {load:.1f} on {cores} cores" if load > cores else ""


def _join(address: str) -> None:
    """Join a cluster; a process that has one already keeps it, but only if somebody answers at `address`."""
    if address == "auto" and not ray.is_initialized():
        # Ray writes down where its last cluster was, and after a crash nobody listens there any more.
        address = canonicalize_bootstrap_address(address) or address
    host, _, port = address.removeprefix("ray://").rpartition(":")
    knocked = bool(host) and port.isdigit()
    if knocked:
        _knock(host.strip("[]"), int(port))
    if ray.is_initialized():
        return
    # Of a time-out; the error says the same.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.util\.client")
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        if knocked and "Failed to connect to Ray cluster" in str(error):
            raise ConnectionError(
                "a server answers, but does not let this command in; does it need RAY_AUTH_TOKEN?"
            ) from error
        raise


def _knock(host: str, port: int) -> None:
    """Raise OSError if no gRPC server answers there; Ray itself would take minutes, and print what it tries."""
    with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(HELLO)
        if connection.recv(5) == b"HTTP/":
            raise ConnectionError("a web server answers; Ray's port is mostly 6379, or 10001 after ray://")


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
def _plain_failure(config: Config, address: str) -> Iterator[None]:
    """Say in one sentence that Ray cannot be started or joined. Raises EclipseError, InterruptedRunError."""
    try:
        yield
    except EclipseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1].partition(". ")[0] if lines else type(error).__name__
        if address == "local":
            if TOO_SLOW in reason:
                reason += busy(os.cpu_count() or 1)
            raise EclipseError(
                f"a Ray cluster could not be started here ({reason}); run the same command again, or see what "
                "`eclipse-ray doctor` says"
            ) from error
        named, here = f"run.address={address}", "add `--set run.address=local`"
        if not config.run.address:
            named, here = f"RAY_ADDRESS={address} in your environment", "`unset RAY_ADDRESS`"
        raise InterruptedRunError(
            f"{named}: no Ray cluster answers there ({reason}); to run on this machine instead, {here}; or start "
            "that cluster, see what `eclipse-ray doctor` says, and run the same command again"
        ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    # A Ray driver that starts its cluster takes this signal over, and would then not say that it can be resumed.
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


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
    """Raise ConfigError when the cluster has fewer GPUs than needed; `setting` says what asks for them."""
    if resources.gpus < needed:
        raise ConfigError(f"{setting} needs {needed:g} GPUs, the Ray cluster has {resources.gpus}; add nodes")


def require_place(resources: Resources, cpus: float, gpus: float, purpose: str) -> None:
    """Raise ConfigError when no machine is large enough for one task with these CPUs and GPUs."""
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


def local_denoiser(url: str) -> str:
    """Return a local folder with the denoiser of `url`. Raises InputError if there is none.

    A remote one is copied once to each node. The cache is named after the card's content, so another denoiser at
    the same URL is fetched anew.
    """
    # Torch comes with it, which `submit` and workers without a denoiser do not need.
    from eclipse_ray.diffusion.checkpoint import CARD_FILE, DENOISER_FILES

    store = Store(url)
    if not store.exists():
        raise InputError(
            f"{url}: there is no such denoiser folder"
            f"{did_you_mean(url) or '; check the path, or make one with `eclipse-ray train`'}"
        )
    if not store.exists(CARD_FILE):
        raise InputError(
            f"{url}: not a denoiser folder ({CARD_FILE} is missing); make one with `eclipse-ray train`"
        )
    if store.local:
        return store.root
    card = store.read(CARD_FILE)
    name = hashlib.sha256(url.encode() + card).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"eclipse_ray-{os.getuid()}" / name
    if not (folder / CARD_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in DENOISER_FILES:
            # Renamed when it is complete, because several actors on a node may fetch it at the same time.
            partial = folder / f".{file}-{os.getpid()}"
            partial.write_bytes(store.read(file))
            partial.replace(folder / file)
    return str(folder)


def check_denoiser(denoiser: Trained, config: Config) -> tuple[int, int]:
    """Return (t_star, num_inference_steps) of section `purify`, before a worker opens the denoiser.

    Raises ConfigError for what the denoiser would refuse, or the processors of this machine if it is the cluster.
    """
    import torch

    from eclipse_ray.diffusion.network import check_device
    from eclipse_ray.diffusion.sampling import check_purification

    if address_of(config) == "local":
        check_device(torch.device("cpu"), config.purify.precision)
    return check_purification(denoiser, config.purify)


def open_denoiser(url: str, precision: Computed | None) -> Denoiser:
    """Return the denoiser of `url` on this process's device, in `precision` or the fast one.

    Raises InputError for a folder that cannot be read, and ConfigError for a precision that is not to be had.
    """
    from eclipse_ray.diffusion.checkpoint import load_denoiser
    from eclipse_ray.diffusion.network import default_device

    return load_denoiser(local_denoiser(url), default_device(), precision)
