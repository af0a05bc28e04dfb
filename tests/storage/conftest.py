"""An S3 server for the whole test session, an environment that points to it, and a proxy that makes faults."""

import uuid
from collections.abc import Iterator

import pytest

from tests.storage.proxy import FaultProxy
from tests.storage.servers import BUCKET, Server, point_at, seaweedfs


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory) -> Iterator[Server]:
    """A SeaweedFS with the bucket `bucket`; its log is shown when a test fails to start it."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_url(seaweed, monkeypatch) -> str:
    """A new folder on SeaweedFS."""
    point_at(monkeypatch, seaweed.port)
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxy(seaweed, monkeypatch) -> Iterator[FaultProxy]:
    """A proxy in front of SeaweedFS; the environment points to it."""
    with FaultProxy(seaweed.port) as proxy:
        point_at(monkeypatch, proxy.server_address[1])
        yield proxy
        proxy.shutdown()


@pytest.fixture
def faulty_url(proxy) -> str:
    """A new folder on SeaweedFS, reached through the proxy."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
