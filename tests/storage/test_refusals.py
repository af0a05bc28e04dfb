"""Permanent errors stop within a minute with one sentence: permissions, credentials, clocks, full servers."""

import datetime
import re
import threading
import time

import botocore.auth
import pytest

from eclipse_ray.errors import StorageError
from eclipse_ray.storage import retries as transient
from eclipse_ray.storage.retries import Patience
from eclipse_ray.storage.store import Store
from tests.storage.proxy import Fault
from tests.storage.servers import BUCKET, SECRET, environment, point_at, seaweedfs
from tests.storage.test_local import fill


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(first_wait=0.01, renewals=1))


@pytest.fixture
def hurry():
    """Fail a test whose error took longer than the promised minute."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 60


def test_credentials_that_may_only_read(seaweed, s3_url, monkeypatch, hurry):
    Store(s3_url).write("x", b"1")
    point_at(monkeypatch, seaweed.port, key="reader")
    reader = Store(s3_url)
    assert reader.read("x") == b"1"
    for change in (reader.write, reader.create):
        with pytest.raises(StorageError, match=r"not allowed to write it .*s3:PutObject") as caught:
            change("y", b"2")
        assert f"{s3_url}/y" in str(caught.value)
    with pytest.raises(StorageError, match="s3:PutObject"):
        reader.probe()
    with pytest.raises(StorageError, match="s3:DeleteObject"):
        reader.delete("x")


def test_a_bucket_that_turns_read_only_stops_the_run_and_resumes_later(proxy, faulty_url, hurry):
    store = Store(faulty_url)
    assert store.create("a", b"1")
    proxy.faults.append(Fault("error", "^PUT", times=99, status=403, code="AccessDenied"))
    with pytest.raises(StorageError, match=r"/b: not allowed to write it .*s3:PutObject"):
        store.create("b", b"1")
    assert proxy.fired["error"] == 1
    proxy.faults.clear()
    assert store.create("b", b"1")
    assert [entry.key for entry in store.list()] == ["a", "b"]


def test_wrong_and_missing_credentials(seaweed, s3_url, monkeypatch, impatient, hurry):
    point_at(monkeypatch, seaweed.port, key="nobody")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        Store(s3_url).read("x")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        Store(s3_url).exists("x")
    point_at(monkeypatch, seaweed.port)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="SignatureDoesNotMatch"):
        list(Store(s3_url).list())
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="no credentials were found"):
        Store(s3_url).read("x")
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    with pytest.raises(StorageError, match="nowhere"):
        Store(s3_url).read("x")


@pytest.fixture
def profile(proxy, monkeypatch, tmp_path):
    """Credentials in a profile file, as renewing tools write it; the proxy refuses the old ones."""
    file = tmp_path / "credentials"

    def write(key: str) -> None:
        file.write_text(f"[work]\naws_access_key_id={key}\naws_secret_access_key={SECRET}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "work")
    write("admin")
    return write


def expire(proxy) -> None:
    old = r"(?i)^authorization: .*Credential=admin/"
    proxy.faults.append(Fault("error", old, times=999, status=400, code="ExpiredToken"))


def test_credentials_that_expire_are_renewed(proxy, faulty_url, profile):
    store = Store(faulty_url)
    assert store.create("a", b"1")
    expire(proxy)
    profile("renewed")
    assert store.create("b", b"1")
    assert store.read("a") == b"1"
    assert [entry.key for entry in Store(faulty_url).list()] == ["a", "b"]
    assert proxy.fired["error"] == 1, "one refusal, then everybody uses the new ones"


def test_credentials_renewed_a_moment_too_late_are_waited_for(proxy, faulty_url, profile):
    store = Store(faulty_url)
    assert store.exists() is False
    expire(proxy)
    timer = threading.Timer(0.3, profile, ("renewed",))
    timer.start()
    with pytest.raises(FileNotFoundError):
        store.read("absent")
    timer.join()
    assert proxy.fired["error"] >= 1


def test_credentials_that_expire_for_good_stop_the_run(proxy, faulty_url, profile, impatient, hurry):
    store = Store(faulty_url)
    assert store.create("a", b"1")
    expire(proxy)
    with pytest.raises(StorageError, match=r"/b: .*the credentials have expired.*renew them"):
        store.create("b", b"1")
    fired = proxy.fired["error"]
    assert fired >= 2
    with pytest.raises(StorageError, match="the credentials have expired"):
        store.exists("a")
    assert proxy.fired["error"] > fired
    profile("renewed")
    assert store.create("b", b"1")


@pytest.mark.parametrize("minutes", [-20, 20])
def test_a_clock_that_is_wrong_is_one_clear_sentence(s3_url, monkeypatch, minutes, hurry):
    """The requests are signed with a wrong time, so a real server refuses them."""
    store = Store(s3_url)
    assert store.create("before", b"1")
    fired = shift_clock(monkeypatch, minutes)
    with pytest.raises(StorageError, match="set the clock") as caught:
        store.create("during", b"1")
    assert "RequestTimeTooSkewed" not in str(caught.value).partition("set the clock")[2]
    with pytest.raises(StorageError, match="set the clock"):
        store.exists("during")
    assert fired
    monkeypatch.undo()


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_that_is_a_little_wrong_decides_nothing(s3_url, monkeypatch, minutes):
    store = Store(s3_url)
    assert store.create("claim", b"1")
    fired = shift_clock(monkeypatch, minutes)
    assert not store.create("claim", b"2")
    assert store.create("next", b"1")
    store.probe()
    assert fired


def shift_clock(monkeypatch, minutes: int) -> list[int]:
    fired: list[int] = []
    real = botocore.auth.get_current_datetime

    def shifted(*arguments, **options):
        fired.append(1)
        return real(*arguments, **options) + datetime.timedelta(minutes=minutes)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", shifted)
    return fired


@pytest.mark.chaos
def test_with_default_patience_unknown_credentials_stop_within_a_minute(seaweed, s3_url, monkeypatch, hurry):
    point_at(monkeypatch, seaweed.port, key="nobody")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        Store(s3_url).create("x", b"1")


@pytest.mark.chaos
def test_a_full_server_is_named_and_nothing_half_is_left(tmp_path, monkeypatch):
    """SeaweedFS without free volumes answers 500 InternalError, like any failing store."""
    with seaweedfs(tmp_path / "full", volumes=7, volume_mb=1) as server:
        point_at(monkeypatch, server.port)
        store = Store(f"s3://{BUCKET}/out")
        written, error = fill(store, 200)
        assert re.search(r"could not write it at http://.*: [0-9]+ tries in .*HTTP 500", error)
        assert [entry.size for entry in store.list()] == [1 << 20] * written


def test_region_and_endpoint_come_from_the_environment(seaweed, s3_url, monkeypatch):
    assert environment(seaweed.port)["AWS_ENDPOINT_URL"].endswith(str(seaweed.port))
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert Store(s3_url).fs.s3.meta.region_name == "eu-central-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert Store(s3_url).fs.s3.meta.region_name == "us-west-2"
