"""Errors of remote stores: transient ones are retried, the others become one sentence that says what to do."""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

from eclipse_ray.contact import ANSWER_SECONDS, CONTACT_SECONDS, bounded, telling
from eclipse_ray.errors import StorageError

T = TypeVar("T")
Kind = Literal["transient", "conflict", "expired", "missing", "lost", "permanent", "unknown"]


@dataclass(frozen=True)
class Patience:
    """How long a failing request is retried.

    `tries` requests at most, `seconds` in total; the wait before the first retry and the longest wait, in seconds;
    `renewals` is how often fresh credentials are fetched.
    """

    tries: int = 8
    seconds: float = 120.0
    first_wait: float = 0.2
    longest_wait: float = 20.0
    renewals: int = 3


@dataclass(frozen=True)
class Action:
    """A request in words, for error messages: the verb and the S3 permission that it needs."""

    verb: str
    permission: str


PATIENCE = Patience()
# Buckets and hosts that have answered this process; what follows is no first contact.
_ANSWERED: set[str] = set()
_JITTER = random.Random()

_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
# Error codes of credentials that expired or were rotated during the run. Fresh credentials help.
_STALE_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
}
# Exceptions by class name, because their libraries may not be installed; the MRO finds subclasses.
_PASSING_NAMES = {
    "ChecksumError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionError",
    "CredentialRetrievalError",
    "FlexibleChecksumError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ProtocolError",
    "ResponseParserError",
    "ServiceRequestError",
    "ServiceResponseError",
    "ShortReadError",
    "TimeoutError",
    "TransportError",
}
_LASTING_NAMES = {
    "ClientSSLError": "the secure connection was refused",
    "NoCredentialsError": "no credentials were found; a public bucket needs none with FSSPEC_S3_ANON=true",
    "NoRegionError": "no region is set",
    "ParamValidationError": "the request is not valid",
    "PartialCredentialsError": "the credentials are incomplete",
    "ProfileNotFound": "the profile does not exist",
    "SSLError": "the secure connection was refused",
    "UnknownCredentialError": "the source of credentials is unknown",
}
# Variables that fsspec reads when it is imported.
_OPEN_BUCKETS = (
    "a public bucket needs FSSPEC_S3_ANON=true, and one whose reader pays needs FSSPEC_S3_REQUESTER_PAYS=true"
)
_SETTINGS = "check AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"


class ShortReadError(OSError):
    """A store sent fewer or more bytes than the object has."""


def retried(
    action: Action, where: str, call: Callable[[], T], renew: Callable[[], None] | None = None, tried: str = ""
) -> T:
    """Return `call()`, retried after growing random waits while it fails with a transient error.

    `renew` fetches fresh credentials; `tried` names the addresses behind `where`. A store that has never answered
    this process is given up after CONTACT_SECONDS, one that has after `PATIENCE`. Raises FileNotFoundError if the
    object does not exist, FileExistsError if a condition failed (HTTP 412), StorageError if the error is permanent
    or outlasts the patience. Errors that do not come from the store are raised unchanged.
    """
    peer = "/".join(where.split("/")[:3])
    known = peer in _ANSWERED
    started, renewals, wait, stale = time.monotonic(), 0, PATIENCE.first_wait, False
    with nullcontext() if known else telling(f"{where} to answer{tried}"):
        for tries in itertools.count(1):
            try:
                if stale and renew is not None:
                    renew()
                result = call() if known else bounded(call, CONTACT_SECONDS - (time.monotonic() - started))
                _ANSWERED.add(peer)
                return result
            except Exception as error:
                kind = kind_of(error)
                if kind == "unknown":
                    raise
                if http_answer(error) is not None:
                    known = True
                    _ANSWERED.add(peer)
                stale = kind == "expired" and renew is not None and renewals < PATIENCE.renewals
                renewals += stale
                if not stale and kind not in ("transient", "conflict"):
                    raise _final(kind, action, where, error, tried) from error
                elapsed = time.monotonic() - started
                # The last try of a first contact must also end in time.
                limit = PATIENCE.seconds if known else min(PATIENCE.seconds, CONTACT_SECONDS - ANSWER_SECONDS)
                if tries >= PATIENCE.tries or elapsed + wait > limit:
                    raise StorageError(
                        f"{where}: could not {action.verb} it{tried}: {tries} tr{'y' if tries == 1 else 'ies'} in "
                        f"{elapsed:.0f} s failed, the last with {_cause(error)}; check the network and the store, "
                        "then run the same command again"
                    ) from error
            # The wait is random so that many workers that failed together do not retry together.
            time.sleep(wait * _JITTER.uniform(0.5, 1.0))
            wait = min(2 * wait, PATIENCE.longest_wait)
    raise AssertionError("unreachable: the loop has no end")


def kind_of(error: BaseException) -> Kind:
    """Return the kind of an error, from the HTTP answer in its cause chain or, without one, from its type."""
    answer = http_answer(error)
    if answer is not None:
        return _kind_of_answer(*answer)
    names = {cls.__name__ for link in _chain(error) for cls in type(link).__mro__}
    if names & _LASTING_NAMES.keys():
        return "permanent"
    # Before FileNotFoundError, which fsspec raises for a web server that cannot be reached, too.
    if names & _PASSING_NAMES:
        return "transient"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, FileExistsError):
        return "lost"
    return "permanent" if "BotoCoreError" in names else "unknown"


def http_answer(error: BaseException) -> tuple[int, str] | None:
    """Return (status, code) of the HTTP answer that caused an error, None if there was no answer."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        status = getattr(link, "status", None)
        if isinstance(status, int):
            return status, ""
    return None


def _kind_of_answer(status: int, code: str) -> Kind:
    if code in _STALE_CREDENTIALS:
        return "expired"
    if code in _PASSING_CODES or status in _PASSING_STATUSES:
        return "transient"
    if status == 412 or code == "PreconditionFailed":
        return "lost"
    if status == 409:
        return "conflict"
    if status == 404 and code != "NoSuchBucket":
        return "missing"
    return "permanent"


def _final(kind: Kind, action: Action, where: str, error: Exception, tried: str) -> Exception:
    if kind == "missing":
        return FileNotFoundError(errno.ENOENT, "there is no such object", where)
    if kind == "lost":
        return FileExistsError(errno.EEXIST, "there is such an object", where)
    return StorageError(f"{where}: {_reason(action, error, tried)}")


def _reason(action: Action, error: Exception, tried: str) -> str:
    answer = http_answer(error)
    if answer is None:
        names = [cls.__name__ for link in _chain(error) for cls in type(link).__mro__]
        known = (_LASTING_NAMES[name] for name in names if name in _LASTING_NAMES)
        short = next(known, "the request could not be made")
        return f"could not {action.verb} it{tried}: {short} ({error}); {_SETTINGS}"
    status, code = answer
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return f"could not {action.verb} it: the store does not accept these credentials ({code}); {_SETTINGS}"
    if code in _STALE_CREDENTIALS:
        return (
            f"could not {action.verb} it: the credentials have expired ({code}) and no fresh ones were found; "
            "renew them (aws sso login, or a new AWS_SESSION_TOKEN), then run the same command again"
        )
    if code == "NoSuchBucket":
        return f"could not {action.verb} it: there is no such bucket; create it or correct the URL"
    if code == "RequestTimeTooSkewed":
        return (
            f"could not {action.verb} it: this machine's clock is too far from the store's; set the clock "
            "(NTP), then run the same command again"
        )
    if status in (401, 403):
        return (
            f"not allowed to {action.verb} it ({_cause(error)}); grant {action.permission} to these credentials, "
            f"then run the same command again; {_OPEN_BUCKETS}"
        )
    if status == 501:
        return (
            f"could not {action.verb} it: the store does not support this request ({_cause(error)}); use another"
        )
    return f"could not {action.verb} it: the store refused ({_cause(error)}: {error}); check the URL and the store"


def _cause(error: Exception) -> str:
    answer = http_answer(error)
    if answer is None:
        return f"{type(error).__name__}: {error}"
    status, code = answer
    return f"HTTP {status}" if code in ("", str(status)) else f"{code}, HTTP {status}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
