"""A real S3 server (SeaweedFS) in a child process, and moto's server in a thread."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Barrier

import botocore.session
import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from eclipse_ray.storage.store import Store

BUCKET = "bucket"
SECRET = "secret-of-the-tests"


@dataclass
class Server:
    """An S3 server on loopback; `environment` is what a client needs."""

    port: int
    environment: dict[str, str]
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def client(self, key: str = "admin"):
        """Return a synchronous client that does not use the code under test."""
        session = botocore.session.Session()
        return session.create_client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=key,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )


def environment(port: int, key: str = "admin") -> dict[str, str]:
    """Return the variables that point a client at a server on loopback."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def point_at(monkeypatch, port: int, key: str = "admin") -> None:
    """Point the environment of this process and its children to a server on loopback."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(port, key).items():
        monkeypatch.setenv(name, value)
    # Seconds after which a silent server counts as lost; 15 by default.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 3}})


@contextmanager
def seaweedfs(folder: Path, volumes: int = 200, volume_mb: int = 1024) -> Iterator[Server]:
    """Start SeaweedFS with its data below `folder`; `admin` and `renewed` may do all, `reader` only read."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [
        {"name": "admin", "actions": everything},
        {"name": "renewed", "actions": everything},
        {"name": "reader", "actions": ["Read", "List"]},
    ]
    for identity in identities:
        identity["credentials"] = [{"accessKey": identity["name"], "secretKey": SECRET}]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir(exist_ok=True)
    ports = master, volume, filer, s3 = _free_ports(4)
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-volume.max={volumes}",
        f"-master.volumeSizeLimitMB={volume_mb}",
        "-master.telemetry=false",
        "-volume.preStopSeconds=0",
        "-filer",
        "-s3",
        f"-s3.config={folder / 'identities.json'}",
    ]
    log = folder / "weed.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
    server = Server(s3, environment(s3), log, process)
    try:
        _wait_until_up(server)
        yield server
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        for port in (*ports, *(port + 10000 for port in ports)):
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


@contextmanager
def moto() -> Iterator[Server]:
    """Start moto's server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    port = running.get_host_and_port()[1]
    server = Server(port, environment(port))
    try:
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        running.stop()


def _contend(url: str, name: int, barrier: Barrier, winners: Queue) -> None:
    barrier.wait(60)
    if Store(url).create("claim", str(name).encode()):
        winners.put(name)


def race(url: str, processes: int, method: str) -> None:
    """Let processes create one key with different bytes at once; exactly one must win."""
    context = multiprocessing.get_context(method)
    barrier, winners = context.Barrier(processes), context.Queue()
    racing = [context.Process(target=_contend, args=(url, n, barrier, winners)) for n in range(processes)]
    for process in racing:
        process.start()
    winner = winners.get(timeout=120)
    for process in racing:
        process.join(60)
        assert process.exitcode == 0
    assert winners.empty()
    assert Store(url).read("claim") == str(winner).encode()


def _wait_until_up(server: Server) -> None:
    deadline = time.monotonic() + 90
    while not _answers(server):
        text = server.log.read_text(errors="replace")[-3000:]
        assert server.process.poll() is None, f"weed ended with {server.process.returncode}:\n{text}"
        assert time.monotonic() < deadline, f"weed did not come up:\n{text}"
        time.sleep(0.2)


def _answers(server: Server) -> bool:
    client = server.client()
    try:
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="up", Body=b"1")
    except (BotoCoreError, ClientError):
        return False
    return True


def _free_ports(count: int) -> list[int]:
    # For gRPC, SeaweedFS also uses each of its ports plus 10,000.
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 50000)
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            found.append(port)
    return found
