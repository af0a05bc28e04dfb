"""Connect to Ray, find what it has, and say clearly when that is not enough."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from eclipse_ray.config import Config
from eclipse_ray.errors import ConfigError, EclipseError, StorageError

# Both make Ray unpickle what it reads (Parquet tensor columns, WebDataset members): never, whoever asks.
UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)


# Ray only counts CPUs; on one machine, more than there are keep decoding and encoding moving beside the actors.
LOCAL_CPUS_PER_CORE = 2


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs of the cluster; `cores` are the CPUs of one machine to spread threads over."""

    cpus: int
    gpus: int
    cores: int
    local: bool

    @property
    def cpus_per_core(self) -> int:
        """Logical CPUs that stand for one real core."""
        return LOCAL_CPUS_PER_CORE if self.local else 1


def connect(config: Config) -> Resources:
    """Join the cluster at run.address or RAY_ADDRESS, else start one here, and return what it has.

    Raises ConfigError if an environment variable asks Ray for unsafe deserialisation.
    """
    for variable in UNSAFE_VARIABLES:
        if os.environ.get(variable):
            raise ConfigError(f"{variable} is set: it lets untrusted data run code; unset it and run again")
    cores = os.cpu_count() or 1
    address = config.run.address or os.environ.get("RAY_ADDRESS") or "local"
    if not ray.is_initialized():
        logging.getLogger("ray").setLevel(logging.WARNING)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address == "local":
            options |= {"num_cpus": LOCAL_CPUS_PER_CORE * cores, "include_dashboard": False}
            # It warns that the cluster it starts here is protected by a token.
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        with _own_sigterm(), _plain_failure(address):
            ray.init(address=address, **options)
    total = ray.cluster_resources()
    return Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), cores, address == "local")


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


def require_cpus(resources: Resources, needed: float, purpose: str) -> None:
    """Raise ConfigError when the cluster can never schedule the work, instead of a hang."""
    if resources.cpus < needed:
        raise ConfigError(
            f"{purpose} needs {needed:g} CPUs, the Ray cluster has {resources.cpus}; "
            "lower purify.actors or denoiser.num_workers, or add nodes"
        )


def refuse_process_local(url: str, in_this_process_only: bool) -> None:
    """Raise StorageError for memory:// locations, which Ray's other processes cannot see."""
    if in_this_process_only:
        raise StorageError(f"{url}: lives in this process alone, Ray workers cannot see it; use a folder or S3")
