"""Which errors are retried, how often, and the messages of the others; without a server."""

import errno
import socket
import threading
import time

import pytest

from eclipse_ray import contact
from eclipse_ray.errors import StorageError
from eclipse_ray.storage import retries as transient
from eclipse_ray.storage.retries import Action, Patience, ShortReadError, kind_of, retried
from eclipse_ray.storage.s3 import S3Folder, _servers
from eclipse_ray.storage.store import Store

READ = Action("read", "s3:GetObject")


class ClientError(Exception):
    """Like botocore's error, with the parsed answer."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


# Like the errors of botocore, aiohttp and httpx with these names, none of which is an OSError.
BotoCoreError, ClientPayloadError, TransportError = (
    type(name, (Exception,), {}) for name in ("BotoCoreError", "ClientPayloadError", "TransportError")
)
NoCredentialsError = type("NoCredentialsError", (BotoCoreError,), {})
HTTPClientError = type("HTTPClientError", (BotoCoreError,), {})
ConnectError = type("ConnectError", (TransportError,), {})


def answered(status: int, code: str) -> OSError:
    error = OSError(errno.EINVAL, "as s3fs raises it")
    error.__cause__ = ClientError(status, code)
    return error


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(tries=5, seconds=20, first_wait=0.001))


def failing(error: Exception, times: int):
    calls: list[int] = []

    def call() -> bytes:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return b"data"

    return calls, call


PASSING = [
    answered(503, "SlowDown"),
    answered(500, "InternalError"),
    answered(200, "InternalError"),
    answered(400, "RequestTimeout"),
    answered(409, "ConditionalRequestConflict"),
    TimeoutError(),
    ConnectionResetError(),
    ClientPayloadError(),
    ConnectError(),
    HTTPClientError(),
    ShortReadError(),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes_is_repeated_within_bounds(error):
    calls, call = failing(error, 3)
    assert retried(READ, "s3://b/k", call) == b"data"
    assert len(calls) == 4
    calls, call = failing(error, 99)
    with pytest.raises(StorageError, match=r"s3://b/k: could not read it: 5 tries in .* failed, the last with"):
        retried(READ, "s3://b/k", call)
    assert len(calls) == 5


LASTING = [
    (answered(403, "AccessDenied"), "s3:GetObject"),
    (answered(403, "403"), "s3:GetObject"),
    (answered(404, "NoSuchBucket"), "no such bucket"),
    (answered(403, "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
    (answered(403, "RequestTimeTooSkewed"), "clock"),
    (answered(501, "NotImplemented"), "does not support"),
    (answered(400, "InvalidArgument"), "refused"),
    (answered(400, "ExpiredToken"), "expired"),
    (NoCredentialsError(), "no credentials were found"),
    (BotoCoreError(), "could not be made"),
]


@pytest.mark.parametrize(("error", "words"), LASTING, ids=[repr(words) for _, words in LASTING])
def test_what_lasts_stops_at_once_in_one_sentence(error, words):
    calls, call = failing(error, 99)
    with pytest.raises(StorageError, match=words) as caught:
        retried(READ, "s3://b/k", call)
    assert len(calls) == 1
    assert str(caught.value).startswith("s3://b/k: ")
    assert "\n" not in str(caught.value)


def test_absence_and_lost_races_keep_their_types():
    for status, code in ((404, "NoSuchKey"), (404, "404"), (404, "NoSuchUpload")):
        with pytest.raises(FileNotFoundError):
            retried(READ, "k", failing(answered(status, code), 1)[1])
    for error in (answered(412, "PreconditionFailed"), answered(412, "412"), FileExistsError()):
        with pytest.raises(FileExistsError):
            retried(READ, "k", failing(error, 1)[1])


def test_the_text_of_an_error_decides_nothing():
    assert kind_of(OSError(errno.EINVAL, "PreconditionFailed 412 SlowDown 503 AccessDenied")) == "unknown"


def test_errors_of_other_origin_are_raised_as_they_are():
    calls, call = failing(ValueError("ours"), 1)
    with pytest.raises(ValueError, match="ours") as caught:
        retried(READ, "k", call)
    assert len(calls) == 1
    assert caught.value.__cause__ is None


def test_expired_credentials_are_renewed_and_used():
    renewed: list[int] = []
    calls, call = failing(answered(400, "ExpiredToken"), 2)
    assert retried(READ, "k", call, lambda: renewed.append(1)) == b"data"
    assert (len(calls), len(renewed)) == (3, 2)
    calls, call = failing(answered(400, "ExpiredToken"), 99)
    with pytest.raises(StorageError, match="renew them"):
        retried(READ, "k", call, lambda: renewed.append(1))
    assert len(calls) == transient.PATIENCE.renewals + 1


def test_time_is_bounded_too(monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(tries=10**6, seconds=0.2, first_wait=0.01))
    calls, call = failing(TimeoutError(), 10**6)
    with pytest.raises(StorageError, match=r"could not read it: [0-9]+ tries"):
        retried(READ, "k", call)
    assert 1 < len(calls) < 100


def test_a_store_that_never_answered_is_given_up_sooner_than_one_that_has(monkeypatch, capsys):
    """A first try that hangs is left behind; people are told; a store that has answered once is not cut short."""
    monkeypatch.setattr(transient, "CONTACT_SECONDS", 0.4)
    monkeypatch.setattr(transient, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(contact, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(transient, "_ANSWERED", set())
    hang = threading.Event()
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"could not read it at http://here: 1 try in 0 s failed.*NoAnswerError"
    ):
        retried(READ, "s3://new/k", lambda: hang.wait(20), tried=" at http://here")
    assert time.monotonic() - started < 10
    assert "waiting for s3://new/k to answer at http://here; given up after 60 s" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        retried(READ, "s3://new/k", failing(answered(404, "NoSuchKey"), 1)[1])
    assert retried(READ, "s3://new/other", lambda: hang.wait(0.6) or b"data") == b"data"
    hang.set()


def test_a_web_server_that_cannot_be_reached_is_not_an_absent_file(monkeypatch):
    monkeypatch.setattr(transient, "PATIENCE", Patience(tries=2, seconds=20, first_wait=0.001))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/denoiser"
        with pytest.raises(StorageError, match=f"{url}: could not read it: 2 tries"):
            Store(url).exists()


def test_the_clock_is_compared_with_the_date_of_an_answer(monkeypatch):
    class Answering:
        s3 = None

        def split_path(self, root):
            return "bucket", "x", None

        def call_s3(self, *_, **__):
            return {"ResponseMetadata": {"HTTPHeaders": {"date": "Thu, 26 Nov 2026 12:00:00 GMT"}}}

    monkeypatch.setattr(time, "time", lambda: 1795694430.0)
    assert S3Folder(Answering(), "bucket/x").seconds_ahead() == 30.0


def test_a_filesystem_that_connects_at_once_is_bounded_too(monkeypatch):
    monkeypatch.setattr(contact, "CONTACT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        url = f"ftp://127.0.0.1:{silent.getsockname()[1]}/denoiser"
        with pytest.raises(StorageError, match=f"{url}: could not connect to it: nothing answered within 0 s"):
            Store(url)


def test_sentences_name_the_server_of_credentials(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        monkeypatch.delenv(name, raising=False)
    assert _servers() == " at Amazon S3"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.23/v1")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/token")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://sts")
    tried = " at http://store:9000, credentials from http://169.254.170.23/v1, credentials from http://sts"
    assert _servers() == tried
    with pytest.raises(StorageError, match=f"s3://b/k: could not read it{tried}: no credentials were found"):
        retried(READ, "s3://b/k", failing(NoCredentialsError(), 1)[1], tried=_servers())
