"""A real Ray head with token authentication, ports and folder of its own; only its own processes are ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOKEN = "a-token-of-the-tests-0123456789abcdef"
CLUSTER_VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
)


AGENT_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")


@dataclass(frozen=True)
class Head:
    """Where the head answers; `log` is of `ray start`, `temp` where Ray keeps its sessions."""

    address: str
    metrics: str
    log: Path
    temp: Path


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listened on a moment ago, below those that Ray's workers and the kernel take."""
    ports: list[int] = []
    candidate = 20_011 + os.getpid() % 5_000
    while len(ports) < count:
        candidate += 1
        # By taking it: a server may listen on another address of this machine.
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", candidate))
            ports.append(candidate)
    return ports


def environment(token: str | None) -> dict[str, str]:
    """Return this process's environment with that token or none, and a home without one."""
    env = {name: value for name, value in os.environ.items() if name not in CLUSTER_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env["HOME"] = tempfile.gettempdir() + "/eclipse-ray-no-home"
    return env | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})


@contextmanager
def running_head(cpus: int, auth: bool = True, worker_cpus: int = 0) -> Iterator[Head]:
    """Start a head, wait for its dashboard, and end it: what belongs to its folder, nothing else.

    With `worker_cpus`, a second node with so many CPUs joins it.
    """
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        names = ["port", "dashboard-port", "metrics-export-port", *AGENT_PORTS, "runtime-env-agent-port"]
        names += ["node-manager-port", "object-manager-port"]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        options = ["--head", "--no-monitor", f"--temp-dir={folder}", "--dashboard-host=127.0.0.1"]
        env = environment(TOKEN if auth else None)
        # What a job imports must be what was sent, not the checkout that runs the tests.
        env.pop("PYTHONPATH", None)
        if not auth:
            env["RAY_AUTH_MODE"] = "disabled"
        log = Path(folder) / "head.log"
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        process = _start(log, env, cpus, ports, *options)
        nodes = [process]
        try:
            _wait(address, process, log)
            if worker_cpus:
                own = dict(zip(["metrics-export-port", *AGENT_PORTS], free_ports(3), strict=True))
                joining = Path(folder) / "worker.log"
                nodes.append(_start(joining, env, worker_cpus, own, f"--address=127.0.0.1:{ports['port']}"))
                _wait_for_words(nodes[-1], joining, time.monotonic() + 120)
            yield Head(address, f"http://127.0.0.1:{ports['metrics-export-port']}/metrics", log, Path(folder))
        finally:
            for node in reversed(nodes):
                node.send_signal(signal.SIGTERM)
                try:
                    node.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    node.kill()
            for pid in _processes_of(folder):
                os.kill(pid, signal.SIGKILL)


def _start(
    log: Path, env: dict[str, str], cpus: int, ports: dict[str, int], *options: str
) -> subprocess.Popen[bytes]:
    # Without what nobody here looks at: a busy machine may not start everything within Ray's 30 s.
    command = ["ray", "start", "--block", "--include-log-monitor=False", "--disable-usage-stats", *options]
    command += [f"--num-cpus={cpus}", "--object-store-memory=200000000"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=env, start_new_session=True)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, f"ray start ended with {process.returncode}:\n{log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
        except urllib.error.HTTPError:
            break
        except OSError:
            assert time.monotonic() < deadline, f"no dashboard at {address}:\n{log.read_text()[-2000:]}"
            time.sleep(0.3)
        else:
            break
    # The dashboard answers before the node's agent does, without which no job starts.
    _wait_for_words(process, log, deadline)


def _wait_for_words(process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.3)


def _processes_of(folder: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if folder.encode() in command:
            found.append(int(entry.name))
    return found
