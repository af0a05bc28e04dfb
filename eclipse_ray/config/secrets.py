"""Passwords and tokens have no place in settings: settings are recorded beside every output and shown in logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from eclipse_ray.errors import ConfigError

# Of a name, after its hyphens are gone: `X-Amz-Signature`, `sig`, `access_token`, `AccountKey`, ...
_SECRET_ENDINGS = ("token", "secret", "password", "passwd", "signature", "credential", "apikey", "accesskey")
_SECRET_NAMES = {"sig", "key", "pwd", "auth", "accountkey", "sas", "awsaccesskeyid"}


def is_secret_name(name: str) -> bool:
    """Return whether a value of that name is a password, key or token."""
    plain = unquote(name).lower().replace("-", "").replace("_", "")
    return plain in _SECRET_NAMES or plain.endswith(_SECRET_ENDINGS)


def holds_secret(text: str) -> bool:
    """Return whether `text` is a URL with a password, or with a token or signature among its parameters."""
    if "://" not in text:
        return False
    try:
        # Of fsspec's chains (zip://x::https://...) every link is looked at.
        links = [urlsplit(link) for link in text.split("::")]
    except ValueError:
        return True
    for link in links:
        login, at, _ = link.netloc.rpartition("@")
        if at and ":" in login:
            return True
        if any(is_secret_name(name) for name, _ in parse_qsl(f"{link.query}&{link.fragment}")):
            return True
    return False


def refuse_secrets(tree: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ConfigError, naming the key and never the value, if any text of the settings holds a secret."""
    for key, value in tree.items():
        _refuse(f"{prefix}{key}", value)


def _refuse(path: str, value: Any) -> None:
    if isinstance(value, Mapping):
        refuse_secrets(value, f"{path}.")
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse(path, item)
    elif isinstance(value, str) and holds_secret(value):
        raise ConfigError(
            f"{path}: the URL holds a password, token or signature, and settings are recorded; leave it out and "
            "give credentials by environment variables, a profile, or the role of the machine"
        )
