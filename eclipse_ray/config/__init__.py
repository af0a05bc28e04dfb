"""Every setting and its default: pydantic sections, YAML in and out, overrides, presets, fingerprint.

This is the one place with defaults. A resolved `Config` is written beside every output, so that any result
can be reproduced with `--config`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from eclipse_ray.config.paths import did_you_mean
from eclipse_ray.config.presets import PRESETS, RECIPES
from eclipse_ray.config.secrets import holds_secret, is_secret_name, refuse_secrets
from eclipse_ray.config.sections import (
    BATCH_PIXELS,
    POISON_VARIANTS,
    TILE,
    TILE_OVERLAP,
    Alpha,
    Animated,
    AuditConfig,
    CompensationConfig,
    DataConfig,
    DefenseConfig,
    DenoiserConfig,
    EvaluateConfig,
    Layout,
    LoggerName,
    MatrixConfig,
    MatrixItem,
    PoisonConfig,
    Precision,
    PrivacyConfig,
    PurifyConfig,
    Range,
    Sampler,
    ScheduleName,
    Section,
    Settings,
    SweepConfig,
    VictimConfig,
)
from eclipse_ray.errors import ConfigError

__all__ = [
    "BATCH_PIXELS",
    "POISON_VARIANTS",
    "PRESETS",
    "RECIPES",
    "TILE",
    "TILE_OVERLAP",
    "Alpha",
    "Animated",
    "AuditConfig",
    "CompensationConfig",
    "Config",
    "DataConfig",
    "DefenseConfig",
    "DenoiserConfig",
    "Layout",
    "LoggerName",
    "MatrixItem",
    "PoisonConfig",
    "Precision",
    "PrivacyConfig",
    "PurifyConfig",
    "Range",
    "RunConfig",
    "Sampler",
    "ScheduleName",
    "Settings",
    "SweepConfig",
    "VictimConfig",
    "chosen_yaml",
    "difference",
    "digest",
    "flatten",
    "holds_secret",
    "is_secret_name",
    "load_config",
    "parse_assignment",
    "to_yaml",
    "with_overrides",
]


class RunConfig(Section):
    """What concerns the whole run."""

    seed: int = Field(0, ge=0, lt=2**63)
    address: str | None = Field(None, description="Ray address; null: RAY_ADDRESS, else a local cluster.")
    max_cpus: int | None = Field(None, ge=1, description="CPUs an autoscaler may reach; null: those there are.")
    max_gpus: int | None = Field(None, ge=0, description="GPUs an autoscaler may reach; null: those there are.")
    progress_seconds: float = Field(10, gt=0, description="Seconds between progress lines off a terminal.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Messages on standard error: for people, or one JSON object a line."
    )
    loggers: tuple[LoggerName, ...] = Field(
        (), description="Who else gets curves of training, victims and trials."
    )


class Config(Section):
    """All settings of all commands."""

    data: DataConfig = Field(default_factory=DataConfig)
    denoiser: DenoiserConfig = Field(default_factory=DenoiserConfig)
    purify: PurifyConfig = Field(default_factory=PurifyConfig)
    compensation: CompensationConfig = Field(default_factory=CompensationConfig)
    defense: DefenseConfig = Field(default_factory=DefenseConfig)
    poison: PoisonConfig = Field(default_factory=PoisonConfig)
    victim: VictimConfig = Field(default_factory=VictimConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    matrix: MatrixConfig = Field(default_factory=MatrixConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    run: RunConfig = Field(default_factory=RunConfig)


def _read_file(file: str) -> bytes:
    return Path(file).read_bytes()


def load_config(
    file: str | None = None, overrides: Settings | None = None, read: Callable[[str], bytes] = _read_file
) -> Config:
    """Return defaults <- preset <- YAML `file`, which `read` reads <- `overrides` ({"section.key": value}).

    Raises ConfigError for an unreadable file, an unknown key (naming the nearest valid one), a bad value, or a
    value that holds a password or token.
    """
    tree = _parsed_yaml(file, read) if file else {}
    for key, value in (overrides or {}).items():
        _assign(tree, key, value)
    denoiser = tree.get("denoiser")
    if isinstance(denoiser, dict):
        _fill(tree, str(denoiser.get("preset", "small")))
    return _validate(tree)


def with_overrides(config: Config, overrides: Settings) -> Config:
    """Return a copy of `config` with {"section.key": value} replaced and everything validated again.

    Another denoiser.preset takes the values of the former one along; what was chosen otherwise stays.
    """
    tree = config.model_dump(exclude_unset=True)
    preset, former = overrides.get("denoiser.preset"), config.denoiser.preset
    if preset in PRESETS and preset != former:
        for section, values in PRESETS[former].items():
            chosen = json.loads(getattr(config, section).model_dump_json())
            tree[section] = {
                key: value
                for key, value in tree.get(section, {}).items()
                if key not in values or chosen[key] != values[key]
            }
        _fill(tree, preset)
    for key, value in overrides.items():
        _assign(tree, key, value)
    return _validate(tree)


def _fill(tree: dict[str, Any], preset: str) -> None:
    """Put the values of a preset where nothing else was chosen."""
    for section, values in PRESETS.get(preset, {}).items():
        chosen = tree.get(section) or {}
        tree[section] = {**values, **chosen} if isinstance(chosen, dict) else chosen


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split one `--set section.key=value`; the value is read as YAML. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: expected section.key=value, for example purify.t_star=100")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {error}") from error


def to_yaml(config: Config) -> str:
    """Return the resolved settings as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def chosen_yaml(config: Config) -> str:
    """Return as YAML only what was set, so that whoever loads it can still tell it from the defaults."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def digest(value: Any) -> str:
    """Return the first 16 hex digits of SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as {"a.b": value}, for differences people can read."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line "a.b: old -> new" for every setting that differs."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _parsed_yaml(file: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(read(file).decode())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file{did_you_mean(file)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML file: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections such as `purify:`, found {type(tree).__name__}")
    return tree


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    section, separator, name = key.partition(".")
    if not separator:
        raise ConfigError(f"{key}: settings are named section.key, for example purify.t_star")
    fields = tree.setdefault(section, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"{section}: expected a section with keys, found {fields!r}")
    fields[name] = value


def _validate(tree: dict[str, Any]) -> Config:
    refuse_secrets(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from None


def _explain(item: dict[str, Any]) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] != "extra_forbidden":
        said = f"{'.'.join(path)}: {item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"[:500]
        return said + _nearest_value(item)
    known = _keys_at(path[:-1])
    close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
    return f"{'.'.join(path)}: unknown setting; did you mean {'.'.join([*path[:-1], *close])}?"


def _nearest_value(item: dict[str, Any]) -> str:
    """Return ", did you mean ...?" for a word that is none of the allowed ones."""
    if item["type"] != "literal_error":
        return ""
    allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    close = difflib.get_close_matches(str(item["input"]), allowed, n=1, cutoff=0.3)
    return f"; did you mean {close[0]}?" if close else ""


def _keys_at(path: list[str]) -> list[str]:
    if not path:
        return list(Config.model_fields)
    section = Config.model_fields[path[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
