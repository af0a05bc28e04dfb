"""The settings in words, for --help and the reference: type, range, default, description."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from eclipse_ray.config import Config


@dataclass(frozen=True)
class Described:
    """One setting in words; `bounds` is empty where any value of the type will do."""

    key: str
    kind: str
    bounds: str
    default: str
    text: str


def describe(key: str) -> Described:
    """Return the setting "section.key" in words. Raises KeyError if there is none."""
    section, _, name = key.partition(".")
    return _described(key, section_fields(section)[name])


def describe_section(section: str) -> list[Described]:
    """Return all settings of a section in words, in order."""
    return [_described(f"{section}.{name}", field) for name, field in section_fields(section).items()]


def section_fields(section: str) -> dict[str, FieldInfo]:
    """Return the fields of a section of the configuration by name."""
    model: Any = Config.model_fields[section].annotation
    return dict(model.model_fields)


def _described(key: str, field: FieldInfo) -> Described:
    default = field.get_default(call_default_factory=True)
    shown = default if isinstance(default, str) else yaml.safe_dump(_plain(default), default_flow_style=True)
    return Described(
        key, _kind(field.annotation), _bounds(field), shown.removesuffix("...\n").strip(), field.description or ""
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(part) for part in parts)
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return "mapping"
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _bounds(field: FieldInfo) -> str:
    """Return the range in words: "0 to 1", "above 0", "1 or more"."""
    limits = {
        name: getattr(one, name)
        for one in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(one, name)
    }
    low = f"above {limits['gt']:g}" if "gt" in limits else f"{limits['ge']:g}" if "ge" in limits else ""
    high = f"below {limits['lt']:g}" if "lt" in limits else f"{limits['le']:g}" if "le" in limits else ""
    if low and high:
        return f"{low} to {high}" if "lt" not in limits else f"{low}, {high}"
    return high or (f"{low} or more" if "ge" in limits else low)
