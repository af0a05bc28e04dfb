"""First contacts with servers that refuse, stay silent or swallow packets, for real, as a table.

    python -m tests.chaos.everyday_contact [WORDS]

Runs the trials whose description contains WORDS. Exits with 1 if a contact takes longer than its bound, if a
sentence does not name the address, or if a line is shown that is not from eclipse-ray. The seconds count from the
start of the process, imports included; a contact counts from TELL_SECONDS before the line that says what is waited
for.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from eclipse_ray.contact import CONTACT_SECONDS, TELL_SECONDS
from eclipse_ray.datasets.synthetic import write_synthetic
from tests.chaos.everyday import Trial, table
from tests.support import train_denoiser

SLACK_SECONDS = 10
"""A busy machine may be this late."""
AT_ONCE = 8
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
OURS = ("error: ", "warning: ", "note: ", "waiting for ", "purify: ", "trying again")


class Plan(NamedTuple):
    """A command, the variables that it gets, and the address that its sentence must name."""

    done: str
    words: list[str]
    variables: dict[str, str]
    named: str

    @property
    def quick(self) -> bool:
        """Whether the sentence may come before anybody is told what is waited for."""
        # The AWS library itself gives the server of an EC2 machine two seconds.
        return any(word in self.done for word in ("refuses", "without", "(EC2)"))


@contextmanager
def refusing() -> Iterator[int]:
    """A port of this machine on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def swallowing() -> Iterator[int]:
    """A port whose queue of connections is full, so that the kernel drops every further packet for it."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("0.0.0.0", 0))
        server.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", server.getsockname()[1]))
        yield server.getsockname()[1]


@contextmanager
def silent(drip: bytes = b"") -> Iterator[int]:
    """A port that takes every connection and never answers, or sends `drip` byte by byte, one in 5 seconds."""
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen(128)
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                if drip:
                    threading.Thread(target=_drip, args=(connection, drip), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def dripping() -> contextmanager[int]:  # type: ignore[type-arg]
    """A port that answers one byte in 5 seconds, so that no time-out of a single read ever ends."""
    return silent(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + 9999 * b" ")


def _drip(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(5)


SERVERS: dict[str, Callable[[], contextmanager[int]]] = {  # type: ignore[type-arg]
    "refuses": refusing,
    "swallows packets": swallowing,
    "takes the connection and stays silent": silent,
    "sends a byte in 5 s": dripping,
}


def plans(folder: Path, ports: dict[str, int]) -> Iterator[Plan]:
    """Yield every trial."""
    local = ["purify", str(folder / "set"), str(folder / "out"), "--denoiser", str(folder / "denoiser")]
    for how, port in ports.items():
        address = f"127.0.0.1:{port}"
        if not how.startswith("sends"):
            yield Plan(f"cluster {how}", [*local, "--set", f"run.address={address}"], {}, address)
            yield Plan(f"cluster, ray:// {how}", [*local, "--set", f"run.address=ray://{address}"], {}, address)
            yield Plan(f"RAY_ADDRESS {how}", local, {"RAY_ADDRESS": address}, "unset RAY_ADDRESS")
        submit = ["submit", "status", "s3://bucket/x", "--address", f"http://{address}"]
        yield Plan(f"dashboard {how}", submit, {"RAY_AUTH_TOKEN": 32 * "x"}, address)
        store = {**KEYS, "AWS_ENDPOINT_URL": f"http://{address}"}
        yield Plan(f"store {how}", ["status", "s3://bucket/x"], store, address)
        url = f"http://{address}/denoiser"
        yield Plan(f"denoiser URL {how}", [*local[:-1], url], {}, address)
        yield Plan(f"--config URL {how}", [*local, "--config", f"http://{address}/run.yaml"], {}, address)
        yield Plan(f"doctor, RAY_ADDRESS {how}", ["doctor"], {"RAY_ADDRESS": address}, "unset RAY_ADDRESS")
        yield Plan(f"doctor --store {how}", ["doctor", "--store", "s3://bucket/x"], store, address)
        for name, variables in token_servers(folder, address).items():
            yield Plan(f"{name} {how}", ["status", "s3://bucket/x"], variables, address)
    yield Plan("RAY_ADDRESS=auto without a cluster", local, {"RAY_ADDRESS": "auto"}, "unset RAY_ADDRESS")


def token_servers(folder: Path, address: str) -> dict[str, dict[str, str]]:
    """Return the variables by which credentials come from a server at `address`, by the name of the server."""
    identity = {"AWS_WEB_IDENTITY_TOKEN_FILE": str(folder / "token"), "AWS_ROLE_ARN": "arn:aws:iam::1:role/tests"}
    return {
        "token server (container)": {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://{address}/creds"},
        "token server (STS)": {**identity, "AWS_ENDPOINT_URL_STS": f"http://{address}"},
        "token server (EC2)": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}"},
    }


def tried(plan: Plan) -> tuple[Trial, list[str]]:
    """Run a command; return how it ended, and what is wrong with that."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    more = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "PYTHONUNBUFFERED": "1"}
    more |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    command = [sys.executable, "-m", "eclipse_ray", *plan.words]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ours, **more, **plan.variables},
    )
    assert process.stdout is not None
    lines = [(time.monotonic() - started, line.strip()) for line in process.stdout]
    code = process.wait()
    mark = "error: " if plan.words[0] != "doctor" else "failed"
    seconds, sentence = next(
        ((at, line) for at, line in lines if line.startswith(mark) and (mark != "failed" or plan.named in line)),
        (time.monotonic() - started, "no sentence"),
    )
    wrong = [] if plan.named in sentence else [f"does not name {plan.named}"]
    told = next((at for at, line in lines if line.startswith("waiting for ")), seconds)
    if seconds - told + TELL_SECONDS > CONTACT_SECONDS + SLACK_SECONDS:
        wrong.append(f"was waited for {seconds - told + TELL_SECONDS:.0f} s")
    if told == seconds and not plan.quick:
        wrong.append("did not say what it waited for")
    if plan.words[0] != "doctor":
        wrong += [f"shows: {line[:200]}" for _, line in lines if line and not line.startswith(OURS)]
    trial = Trial(plan.done, code, seconds, sentence)
    print(table([trial]).splitlines()[1], file=sys.stderr, flush=True)
    return trial, wrong


def main() -> None:
    """Print the table of the trials."""
    words = " ".join(sys.argv[1:])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everyday-")))
        write_synthetic(str(folder / "set"), 24, 16, 0)
        write_synthetic(str(folder / "clean"), 12, 16, 1)
        train_denoiser(str(folder / "clean"), str(folder / "denoiser"))
        (folder / "token").write_text("a token that proves who we are")
        ports = {how: stack.enter_context(server()) for how, server in SERVERS.items()}
        chosen = [plan for plan in plans(folder, ports) if words in plan.done]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(tried, chosen))
    print(table(trial for trial, _ in found))
    complaints = [f"{trial.done}: {one}" for trial, wrong in found for one in wrong]
    print("\n".join(complaints) or "every trial ended within its bound and named what it tried")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
