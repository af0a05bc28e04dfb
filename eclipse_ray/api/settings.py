"""How a call of the API comes to its settings."""

from __future__ import annotations

from pathlib import Path

from eclipse_ray import log
from eclipse_ray.config import (
    Config,
    Settings,
    holds_secret,
    load_config,
    with_overrides,
)
from eclipse_ray.errors import ConfigError

ConfigLike = Config | str | None


def resolve(config: ConfigLike, settings: Settings | None, named: Settings) -> Config:
    """Return the settings of one call: `config` <- `settings` <- those of `named` that are not None.

    A config file may lie at a path or any fsspec URL. From here on messages have the form of run.log_format.
    """
    overrides = {**(settings or {}), **{key: value for key, value in named.items() if value is not None}}
    if isinstance(config, Config):
        resolved = with_overrides(config, overrides)
    else:
        resolved = load_config(config, overrides, _read_anywhere)
    log.set_format(resolved.run.log_format)
    return resolved


def _read_anywhere(url: str) -> bytes:
    if "://" not in url:
        return Path(url).read_bytes()
    from eclipse_ray.storage.store import Store

    if holds_secret(url):
        raise ConfigError("--config: the URL holds a password or token; give credentials by environment variables")
    return Store(url).read()
