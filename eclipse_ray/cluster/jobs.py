"""Send a verb to a cluster as a Ray job: the same run once, its log followed, its exit code returned."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from packaging.requirements import Requirement
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import eclipse_ray
from eclipse_ray.cluster.connect import refuse_unsafe_environment, require_ray
from eclipse_ray.config import (
    Config,
    RunConfig,
    digest,
    holds_secret,
    is_secret_name,
    locations,
    require_everywhere,
    to_yaml,
    with_overrides,
)
from eclipse_ray.contact import ANSWER_SECONDS, NoAnswerError, first_contact
from eclipse_ray.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_RUN_AGAIN,
    EXIT_TOO_MANY_FAILED,
    ConfigError,
    InterruptedRunError,
)
from eclipse_ray.log import listen, say
from eclipse_ray.parameters import submittable
from eclipse_ray.results import SubmitResult

TOKEN_HELP = (
    "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or leave it in ~/.ray/auth_token "
    "(`ray get-auth-token --generate` makes one for a new cluster)"
)
# Ray puts either of them in the place of an address that was given; here what was asked for counts.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def open_cluster(address: str | None, insecure: bool) -> JobSubmissionClient:
    """Return a client of the jobs API at `address` (http://host:port; null: RAY_API_SERVER_ADDRESS).

    Raises ConfigError without a token, for a cluster that asks nobody for one (both unless `insecure`), a wrong
    token, or a Ray that is too old here or there; InterruptedRunError if nobody answers.
    """
    require_ray(ray.__version__, "here")
    url = _url(address or os.environ.get("RAY_API_SERVER_ADDRESS"))
    token, _ = find_token() or (None, "")
    if token is None and not insecure:
        raise ConfigError(
            f"no token for {url}: a cluster without one runs code for anybody who can reach it; {TOKEN_HELP}, "
            "or add --insecure if nobody else can reach it"
        )
    _check_door(url, token, insecure)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    require_ray(_version(url, headers), f"on the cluster {url}")
    with _without(_ADDRESS_VARIABLES):
        return JobSubmissionClient(url, headers=headers)


def find_token() -> tuple[str, str] | None:
    """Return the token that Ray itself would take and its place, one of the same three; None if there is none.

    Raises ConfigError if RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
        return (token, str(path)) if token else None
    except OSError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH {named}: cannot be read: {error.strerror}") from None
        return None


def _url(address: str | None) -> str:
    if not address:
        raise ConfigError("no cluster: name its dashboard, for example --address http://127.0.0.1:8265")
    if holds_secret(address):
        raise ConfigError(f"--address holds a password or token, which logs would show; {TOKEN_HELP}")
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--address {address}: expected the dashboard's address, such as http://127.0.0.1:8265")
    return url


def _check_door(url: str, token: str | None, insecure: bool) -> None:
    """Knock without a token first: a cluster that lets anybody in is refused."""
    if _get(url, "/api/jobs/", {}).status_code not in (401, 403):
        _version(url, {})
        if not insecure:
            raise ConfigError(
                f"{url} asks nobody for a token, so anybody who can reach it can run code there; start it with "
                "RAY_AUTH_MODE=token, or add --insecure if nobody else can reach it"
            )
        return
    if token is None:
        raise ConfigError(f"{url} asks for a token; {TOKEN_HELP}")
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        say(f"warning: the token travels unencrypted to {url}; forward its port to 127.0.0.1, or use https")
    if _get(url, "/api/jobs/", {"Authorization": f"Bearer {token}"}).status_code in (401, 403):
        raise ConfigError(f"{url} does not accept this token; {TOKEN_HELP}")


def _version(url: str, headers: dict[str, str]) -> str:
    try:
        return str(_get(url, "/api/version", headers).json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{url}: what answers there is no Ray dashboard; is the address right?") from None


def _get(url: str, path: str, headers: dict[str, str]) -> requests.Response:
    def get() -> requests.Response:
        return requests.get(url + path, headers=headers, timeout=ANSWER_SECONDS)

    try:
        # A server may send a byte now and then, which keeps a request alive for ever.
        return first_contact(f"the dashboard at {url} to answer", get)
    except (requests.exceptions.RequestException, NoAnswerError) as error:
        raise InterruptedRunError(
            f"{url}: no cluster answers ({type(error).__name__}); is the address right and its port forwarded? It "
            "is that of --address, or else of RAY_API_SERVER_ADDRESS in your environment"
        ) from None


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    os.environ.update(kept)


CONFIG_FILE = "run.yaml"
SETUP_SECONDS = 3600
"""The first job on a node installs torch there."""
KILLED = (-9, -15, 137, 143)
"""Exit codes of a driver that was killed: what it committed stays, so that it can be run again."""
# How the work is watched, not what is done; with another of these it is still the same run.
UNBOUND_RUN = set(RunConfig.model_fields) - {"seed"}
_LOOK_SECONDS, _STOP_SECONDS = 0.5, 15
_RECONNECT_SECONDS, _PATIENCE_SECONDS = 3, 900
# Optional libraries that verbs need on the nodes: a sweep draws pictures there.
_EXTRAS = ("s3", "report")


@dataclass(frozen=True)
class Order:
    """What to run: a verb, its arguments without --config and --set, the settings; and how.

    `again` submits although the same run succeeded before; `image_has_deps` installs nothing on the nodes; `env`
    are variables of the job and its workers.
    """

    verb: str
    arguments: tuple[str, ...]
    config: Config
    again: bool = False
    image_has_deps: bool = False
    env: Mapping[str, str] | None = None

    @property
    def identity(self) -> str:
        """The job's name on the cluster, equal for equal runs."""
        tree = self.config.model_dump(mode="json", exclude={"run": UNBOUND_RUN})
        return f"eclipse-ray-{self.verb}-{digest([self.verb, self.arguments, tree, eclipse_ray.__version__])}"

    @property
    def entrypoint(self) -> str:
        """The shell command of the job, in its working directory."""
        return shlex.join(["python", "-m", "eclipse_ray", self.verb, *self.arguments, "--config", CONFIG_FILE])


def submit(
    order: Order,
    *,
    address: str | None = None,
    insecure: bool = False,
    wait: bool = True,
    stop_on_interrupt: Callable[[str], bool] | None = None,
    show: Callable[[str], None],
) -> SubmitResult:
    """Run `order` on the cluster, or join it if it runs there, show its log until it ends, and say how it ended.

    When interrupted (Ctrl-C, SIGTERM) the job goes on, unless `stop_on_interrupt`, asked with its id, says to stop
    it. Raises ConfigError as `open_cluster` does, and for what must not leave this machine.
    """
    refuse_unsafe_environment()
    _check(order)
    # The SDK tells everything it does.
    listen("ray", sdk.__name__)
    client = open_cluster(address, insecure)
    name, attached = _place(client, order)
    if not wait:
        return SubmitResult(name, str(client.get_job_info(name).status.value), None, attached)
    try:
        _follow(client, name, show)
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        # Of what ends this command otherwise, SIGTERM or a lost connection, nobody waits for a question.
        ask = stop_on_interrupt if isinstance(stop, KeyboardInterrupt) else None
        if ask is None or not ask(name):
            raise InterruptedRunError(
                f"job {name} goes on without this terminal; the same command shows it again, "
                f"`ray job stop {name} --address {client.get_address()}` stops it"
            ) from None
        client.stop_job(name)
        _wait_for_end(client, name, _STOP_SECONDS)
    details = client.get_job_info(name)
    code = exit_code(details)
    if code not in (EXIT_OK, EXIT_TOO_MANY_FAILED):
        say(f"job {name}: {_reason(details)}", level="error")
    return SubmitResult(name, str(details.status.value), code, attached)


def exit_code(details: JobDetails) -> int:
    """Return what a job that has ended would have exited with here."""
    if details.status is JobStatus.SUCCEEDED:
        return EXIT_OK
    if details.status is not JobStatus.FAILED or details.driver_exit_code in KILLED:
        return EXIT_RUN_AGAIN
    own = (EXIT_BAD_INPUT, EXIT_TOO_MANY_FAILED, EXIT_RUN_AGAIN)
    return details.driver_exit_code if details.driver_exit_code in own else EXIT_FAILURE


def _reason(details: JobDetails) -> str:
    if details.status is JobStatus.STOPPED:
        return "stopped; the same command resumes it"
    if exit_code(details) == EXIT_RUN_AGAIN:
        return f"its driver ended with {details.driver_exit_code}; the same command resumes it"
    if details.driver_exit_code is not None:
        return f"failed with exit code {details.driver_exit_code}; its log says why"
    return f"never began: {(details.message or 'no reason given').strip()}"


def _check(order: Order) -> None:
    """Refuse what would put a secret into the cluster's records, and paths of this machine that the verb reads."""
    for key, location in locations(order.config, submittable(order.verb).reads):
        require_everywhere(f"submit {order.verb}: {key} ", location)
    for argument in order.arguments:
        if holds_secret(argument.partition("=")[2] or argument) or holds_secret(argument):
            raise ConfigError("an argument holds a password or token; give credentials to the nodes instead")
    for name, value in (order.env or {}).items():
        if is_secret_name(name) or holds_secret(value):
            raise ConfigError(
                f"--env {name}: the cluster's dashboard shows variables of jobs; give secrets to the nodes instead"
            )


def _place(client: JobSubmissionClient, order: Order) -> tuple[str, bool]:
    """Return the id of the job that runs `order`, and whether it was there before."""
    name = order.identity
    last = _last_of(client, name)
    if last is not None:
        status = last[1].status
        running, done = not status.is_terminal(), status is JobStatus.SUCCEEDED
        name_now = str(last[1].submission_id)
        if running or (done and not order.again):
            what = "runs already; this is its log" if running else "succeeded before; --again runs it anew"
            say(f"job {name_now} {what}")
            return name_now, True
        say(f"job {name_now} has ended ({status.value}); resuming it")
        name = f"{name}-{last[0] + 1}"
    try:
        with tempfile.TemporaryDirectory(prefix="eclipse-ray-submit-") as folder:
            client.submit_job(
                entrypoint=order.entrypoint,
                submission_id=name,
                runtime_env=runtime_env(order, Path(folder)),
                metadata={"job_name": f"eclipse-ray {order.verb}"},
            )
    except RuntimeError as error:
        # Ray has no class of its own for this. A run that was submitted elsewhere in the meantime is shown.
        if all(details.submission_id != name for details in client.list_jobs()):
            raise ConfigError(f"the cluster refused the job: {error}") from error
        say(f"job {name} runs already; this is its log")
        return name, True
    say(f"job {name} submitted to {client.get_address()}")
    return name, False


def _last_of(client: JobSubmissionClient, name: str) -> tuple[int, JobDetails] | None:
    """Return the job `name`, `name`-2, ... of the highest number, and the number."""
    numbered = re.compile(rf"{re.escape(name)}(?:-([0-9]+))?")
    jobs = [(numbered.fullmatch(details.submission_id or ""), details) for details in client.list_jobs()]
    found = [(int(match[1] or 1), details) for match, details in jobs if match]
    return max(found, key=lambda item: item[0], default=None)


def runtime_env(order: Order, folder: Path) -> dict[str, Any]:
    """Fill `folder` with the package and the settings, and return the job's environment.

    The folder's content alone names the upload, so nothing is sent twice.
    """
    package = Path(eclipse_ray.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    # The job finds its own cluster, whatever address is good for here.
    config = with_overrides(order.config, {"run.address": None})
    (folder / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    environment: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(order.env or {})}
    if not order.image_has_deps:
        environment |= {"pip": pinned(), "config": {"setup_timeout_seconds": SETUP_SECONDS}}
    return environment


def pinned() -> list[str]:
    """Return what the package needs, of the versions in use here; pip passes over what a node has already.

    Without Ray, which a cluster brings; with the libraries of S3, pictures and reports if they are installed here.
    """
    try:
        needed = [Requirement(text) for text in metadata.requires("eclipse-ray") or []]
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "eclipse-ray is not installed here, so its requirements are unknown; install it (pip install -e .), "
            "or add --image-has-deps if the nodes have them"
        ) from None
    pins = []
    for requirement in needed:
        marker = requirement.marker
        wanted_by = [each for each in ("", *_EXTRAS) if marker is None or marker.evaluate({"extra": each})]
        if requirement.name == "ray" or not wanted_by:
            continue
        try:
            # Without the local part: 2.13.0+cpu here is 2.13.0, for whatever device, there.
            pins.append(f"{requirement.name}=={metadata.version(requirement.name).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            if "" in wanted_by:
                raise ConfigError(f"{requirement.name} is not installed here; mend this environment") from None
    return sorted(pins)


def _follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> None:
    """Show the log as it grows until the job has ended; a lost connection is made again."""
    chunks: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
    shown, lost_at = 0, None
    while True:
        threading.Thread(target=_tail, args=(client, name, chunks.put), daemon=True).start()
        # Every tail begins at the beginning: what was shown before is passed over.
        passed = 0
        while True:
            try:
                chunk = chunks.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if chunk is None or isinstance(chunk, Exception):
                break
            lost_at = None
            fresh = chunk[max(0, shown - passed) :]
            passed += len(chunk)
            shown = max(shown, passed)
            if fresh:
                show(fresh)
        try:
            if _wait_for_end(client, name, _RECONNECT_SECONDS):
                return
        except (OSError, RuntimeError) as error:
            chunk = error
        if chunk is not None and lost_at is None:
            lost_at = time.monotonic()
            say(f"the connection to {client.get_address()} was lost; the job goes on; trying again")
        if lost_at is not None and time.monotonic() - lost_at > _PATIENCE_SECONDS:
            raise InterruptedRunError(f"no connection for {_PATIENCE_SECONDS} s")
        time.sleep(_LOOK_SECONDS)


def _tail(client: JobSubmissionClient, name: str, put: Callable[[str | Exception | None], None]) -> None:
    async def tail() -> None:
        async for chunk in client.tail_job_logs(name):
            put(chunk)

    try:
        asyncio.run(tail())
    except Exception as error:  # noqa: BLE001 - handed to the thread that waits
        put(error)
    else:
        put(None)


def _wait_for_end(client: JobSubmissionClient, name: str, seconds: float) -> bool:
    """Return whether the job has ended, after at most this many seconds."""
    deadline = time.monotonic() + seconds
    while not client.get_job_info(name).status.is_terminal():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True
