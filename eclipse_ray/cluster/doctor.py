"""Is this machine, this cluster and this store fit for a run: each check is one line that says what to do."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from eclipse_ray.cluster.connect import LOCAL_CPUS_PER_CORE, UNSAFE_VARIABLES, address_of, busy, connect
from eclipse_ray.cluster.jobs import find_token
from eclipse_ray.config import Config
from eclipse_ray.errors import EclipseError
from eclipse_ray.results import Check, DoctorResult
from eclipse_ray.storage.store import Store

PACKAGE = "eclipse-ray"
# Below this, spilled shards and the logs of Ray soon fill a disk. Ray itself stops at 95 %.
DISK_BYTES, DISK_FULL = 5 * 2**30, 0.95
# Docker gives 64 MiB unless asked; then Ray keeps its objects on disk, many times slower.
SHM_BYTES = 2**30
SHM = Path("/dev/shm")
# Of each actor: two shards that wait for it and one that it has done. Ray Data takes half of the object store.
SHARDS_PER_ACTOR, SHARE_OF_RAY_DATA = 3, 0.5
# A file of this size tells a full disk from one with room.
TRIAL_BYTES = 2**20
# S3 refuses every request of a clock that is wrong by 900 s.
SKEW_SECONDS = 60


def doctor(config: Config, store: str | None = None) -> DoctorResult:
    """Check versions, devices, Ray, `store` (a place for outputs), token, folders, disk and shared memory.

    Nothing stays behind: the store gets one object, which is deleted again. `ok` is false if a check failed.
    """
    checks = [
        *_guarded("versions", _versions),
        *_guarded("devices", _devices),
        *_guarded("environment", _environment),
        *_guarded("ray", lambda: _ray(config)),
        *_guarded("token", lambda: _token(address_of(config))),
        *_guarded("home", _home),
        *_guarded("temporary", _temporary),
        *_guarded("disk", _disk),
        *_guarded("shared memory", lambda: _shared_memory(config)),
    ]
    if store is not None:
        checks += _guarded("store", lambda: _store(store, config.purify.single_writer))
    return DoctorResult(all(check.verdict != "failed" for check in checks), checks)


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """Return what a look found. An error in it becomes a failed check, so that the others still run."""
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever is wrong
        said = str(error).strip().splitlines()
        words = said[-1] if said else type(error).__name__
        return [Check(name, "failed", words, "mend this first; it comes from the machine, not from your data")]


def _versions() -> Iterator[Check]:
    """Compare Python and every required package with what pyproject.toml asks for."""
    try:
        found = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        yield Check("versions", "warning", f"{PACKAGE} is not installed", "pip install -e . in its folder")
        return
    python = ".".join(str(part) for part in sys.version_info[:3])
    yield _version("python", python, found["Requires-Python"] or "")
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            yield _version(requirement.name, metadata.version(requirement.name), str(requirement.specifier))
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, "failed", "not installed", f"pip install '{line.partition(';')[0]}'")


def _version(name: str, version: str, wanted: str) -> Check:
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, "ok", f"{version} ({wanted})")
    return Check(name, "failed", f"{version}, needed {wanted}", f"pip install '{name}{wanted}'")


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words, load = f"{cores} cores, {memory:.1f} GiB of memory", busy(cores)
    if load:
        fix = "other programs use them: a run takes longer, and Ray may not start in time; wait, or stop them"
        yield Check("cpu", "warning", words + load, fix)
    else:
        yield Check("cpu", "ok", words)
    if not torch.cuda.is_available():
        fix = (
            "" if torch.version.cuda else "this torch was built without CUDA; with a GPU, install one that has it"
        )
        yield Check("gpu", "ok", "none here: everything runs on the CPU", fix)
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Check(f"gpu {index}", "ok", f"{found.name}, {found.total_memory / 2**30:.0f} GiB")


def _environment() -> Iterator[Check]:
    for variable in UNSAFE_VARIABLES:
        if os.environ.get(variable):
            yield Check(variable, "failed", "set: untrusted data could run code", f"unset {variable}")


def _ray(config: Config) -> Iterator[Check]:
    address = address_of(config)
    if address == "local":
        yield Check("ray", "ok", "no address is set: a run starts a cluster on this machine and ends it")
        return
    try:
        resources = connect(config)
    except EclipseError as error:
        fix = "or compare the Ray and Python versions of both sides and the token (RAY_AUTH_TOKEN)"
        yield Check("ray", "failed", str(error), fix)
        return
    words = f"{address}: {resources.cpus} CPUs, {resources.gpus} GPUs"
    if resources.cpus < 2:
        yield Check("ray", "failed", words, "an actor and a reader need 2 CPUs; add nodes")
    else:
        yield Check("ray", "ok", words)


def _token(address: str) -> Iterator[Check]:
    held = find_token()
    mode = os.environ.get("RAY_AUTH_MODE", "")
    words = f"in {held[1]}" if held else "none"
    fix = "ray get-auth-token --generate, and give every node the token and RAY_AUTH_MODE=token"
    if address == "local":
        yield Check("token", "ok", f"{words}; a cluster of this machine alone makes its own")
    elif mode == "token" and not held:
        yield Check("token", "failed", "RAY_AUTH_MODE is token, but there is none", fix)
    elif not held or mode == "disabled":
        yield Check("token", "warning", f"{words}: whoever reaches the cluster's ports can run code there", fix)
    else:
        yield Check("token", "ok", words)


def _ray_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _home() -> Iterator[Check]:
    home = Path.home()
    if home.is_dir():
        yield Check("home", "ok", str(home))
        return
    parent = next(folder for folder in home.parents if folder.is_dir())
    # Ray makes it to keep the token of a cluster that it starts.
    fix = "create it, or set HOME to a folder that you may write to"
    if os.access(parent, os.W_OK):
        yield Check("home", "warning", f"{home} does not exist", fix)
    else:
        yield Check("home", "failed", f"{home} does not exist and cannot be made in {parent}", fix)


def _temporary() -> Iterator[Check]:
    folder = _ray_folder()
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(TRIAL_BYTES))
    except OSError as error:
        fix = "mend it, or set RAY_TMPDIR and TMPDIR to a folder that you may write to"
        yield Check("temporary", "failed", f"{folder}: cannot write there ({error.strerror})", fix)
        return
    yield Check("temporary", "ok", f"{folder} can be written to")


def _disk() -> Iterator[Check]:
    folder = _ray_folder()
    usage = shutil.disk_usage(folder)
    words = f"{usage.free / 2**30:,.1f} GiB free of {usage.total / 2**30:,.0f} in {folder} (Ray's files)"
    if 1 - usage.free / usage.total > DISK_FULL:
        yield Check(
            "disk", "failed", words, "Ray stops above 95 %: free space, or set RAY_TMPDIR to a larger disk"
        )
    elif usage.free < DISK_BYTES:
        yield Check("disk", "warning", words, "free space, or set RAY_TMPDIR to a larger disk")
    else:
        yield Check("disk", "ok", words)


def _shared_memory(config: Config) -> Iterator[Check]:
    if not SHM.is_dir():
        return
    usage = shutil.disk_usage(SHM)
    actors = config.purify.actors or max(1, LOCAL_CPUS_PER_CORE * (os.cpu_count() or 1) // 2)
    needed = max(SHM_BYTES, int(actors * SHARDS_PER_ACTOR * config.purify.shard_bytes / SHARE_OF_RAY_DATA))
    words = f"{usage.free / 2**30:,.2f} GiB free of {usage.total / 2**30:,.2f} in {SHM}"
    if usage.free < needed:
        words += f"; {actors} actors with shards of purify.shard_bytes need up to {needed / 2**30:,.2f} GiB"
        fix = (
            f"give the container more, for example docker run --shm-size={-(-needed // 2**30)}g or an emptyDir of "
            "medium Memory, or lower purify.shard_bytes"
        )
        yield Check("shared memory", "warning", words, fix)
    else:
        yield Check("shared memory", "ok", words)


def _store(url: str, single_writer: bool) -> Iterator[Check]:
    try:
        store = Store(url, single_writer)
        store.probe()
    except EclipseError as error:
        text = str(error)
        lacking = url.startswith("s3://") and find_spec("s3fs") is None
        fix = "pip install 'eclipse-ray[s3]'" if lacking else "see docs: Your data on S3"
        yield Check("store", "failed", text, fix)
        return
    ahead = store.seconds_ahead()
    if ahead is not None and abs(ahead) > SKEW_SECONDS:
        words = (
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of the store"
        )
        yield Check("clock", "warning", words, "set the clock (NTP); S3 refuses requests that are 900 s off")
    how = "written without put-if-absent, as asked" if single_writer else "creates a key only once"
    yield Check("store", "ok", f"{store.url}: readable, writable, {how}")
