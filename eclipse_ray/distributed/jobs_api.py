"""The jobs API of a Ray cluster, reached with a token or not at all: it runs whatever it is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ray
import requests
from ray.job_submission import JobSubmissionClient

from eclipse_ray.config import holds_secret
from eclipse_ray.distributed.cluster import require_ray
from eclipse_ray.errors import ConfigError, InterruptedRunError
from eclipse_ray.log import say

TOKEN_HELP = (
    "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or leave it in ~/.ray/auth_token "
    "(`ray get-auth-token --generate` makes one for a new cluster)"
)
# Ray puts either of them in the place of an address that was given; here what was asked for counts.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_SECONDS = 20


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
    try:
        return requests.get(url + path, headers=headers, timeout=_SECONDS)
    except requests.exceptions.RequestException as error:
        raise InterruptedRunError(
            f"{url}: no cluster answers ({type(error).__name__}); is the address right and its port forwarded?"
        ) from None


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    os.environ.update(kept)
