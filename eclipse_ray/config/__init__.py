"""All settings together: YAML in and out, overrides, presets, fingerprint.

The sections with their defaults are in `sections`. A resolved `Config` is written beside every output, so that any
result can be reproduced with `--config`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml
from pydantic import BaseModel, Field, ValidationError

from eclipse_ray.config import sections
from eclipse_ray.config.sections import *  # noqa: F403 - the sections and their words are offered here
from eclipse_ray.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    # Importing it takes as long as all else of --help.
    import numpy as np
    from numpy.typing import NDArray

Model = TypeVar("Model", bound=BaseModel)


class Config(sections.Section):
    """All settings of all commands."""

    data: sections.DataConfig = Field(default_factory=sections.DataConfig)
    denoiser: sections.DenoiserConfig = Field(default_factory=sections.DenoiserConfig)
    purify: sections.PurifyConfig = Field(default_factory=sections.PurifyConfig)
    compensation: sections.CompensationConfig = Field(default_factory=sections.CompensationConfig)
    defense: sections.DefenseConfig = Field(default_factory=sections.DefenseConfig)
    poison: sections.PoisonConfig = Field(default_factory=sections.PoisonConfig)
    victim: sections.VictimConfig = Field(default_factory=sections.VictimConfig)
    evaluate: sections.EvaluateConfig = Field(default_factory=sections.EvaluateConfig)
    matrix: sections.MatrixConfig = Field(default_factory=sections.MatrixConfig)
    sweep: sections.SweepConfig = Field(default_factory=sections.SweepConfig)
    audit: sections.AuditConfig = Field(default_factory=sections.AuditConfig)
    run: sections.RunConfig = Field(default_factory=sections.RunConfig)


def _read_file(file: str) -> bytes:
    return Path(file).read_bytes()


def load_config(
    file: str | None = None, overrides: sections.Settings | None = None, read: Callable[[str], bytes] = _read_file
) -> Config:
    """Return defaults <- preset <- YAML `file`, which `read` reads <- `overrides` ({"section.key": value}).

    Raises ConfigError for an unreadable file, an unknown key (naming the nearest valid one), a bad value, or a
    value that holds a password or token.
    """
    return _overridden({} if file is None else _parsed_yaml(file, read), overrides or {})


def recorded_config(tree: Any) -> Config:
    """Return settings that an earlier version recorded, without those that this version no longer has."""
    if not isinstance(tree, Mapping):
        return Config.model_validate(tree)
    kept = {section: values for section, values in tree.items() if section in Config.model_fields}
    for section, values in kept.items():
        model: Any = Config.model_fields[section].annotation
        if isinstance(values, Mapping):
            known = values if model.model_config.get("extra") == "allow" else model.model_fields
            kept[section] = {key: value for key, value in values.items() if key in known}
    return Config.model_validate(kept)


def with_overrides(config: Config, overrides: sections.Settings) -> Config:
    """Return a copy of `config` with {"section.key": value} replaced and everything validated again.

    Another denoiser.preset or victim.recipe takes the values of the former one along, and another denoiser.t_star
    takes t_max along. A value that differs from those stays. Only values count, not whether they were written out.
    """
    return _overridden(config.model_dump(mode="json"), overrides)


SELECTORS = frozenset({"denoiser.preset", "victim.recipe", "denoiser.t_star", "denoiser.num_train_timesteps"})
"""Settings on which the defaults of others depend."""


def _overridden(tree: dict[str, Any], overrides: sections.Settings) -> Config:
    if not SELECTORS.isdisjoint(overrides):
        tree = _without_groups(tree)
    for key, value in overrides.items():
        _assign(tree, key, value)
    for section, values in sections.PRESETS.get(_preset(tree), {}).items():
        chosen = tree.get(section) or {}
        tree[section] = {**values, **chosen} if isinstance(chosen, dict) else chosen
    refuse_secrets(tree)
    return validated(Config, tree)


def _without_groups(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` without the values that its preset and recipe give anyway: others can take their place."""
    found = dict(tree)
    for section, chosen in tree.items():
        if section in _defaults() and isinstance(chosen, Mapping):
            given = _given(tree, section, chosen)
            # A value that no group gives is dropped too where it is the default, which then stands in its place.
            found[section] = {key: val for key, val in chosen.items() if key not in given or val != given[key]}
    return found


def _preset(tree: Mapping[str, Any]) -> str:
    denoiser = tree.get("denoiser")
    return str(denoiser.get("preset", "small")) if isinstance(denoiser, Mapping) else "small"


def _given(tree: Mapping[str, Any], section: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a section holds under the preset and recipe of `tree` where nothing else is chosen."""
    group = sections.PRESETS.get(_preset(tree), {}).get(section, {})
    if section == "victim":
        group = sections.RECIPES.get(str(chosen.get("recipe", "quick")), {})
    given = {**_defaults()[section], **group}
    if section == "denoiser" and "t_max" not in group:
        t_star, levels = ({**given, **chosen}[key] for key in ("t_star", "num_train_timesteps"))
        if isinstance(t_star, int) and isinstance(levels, int):
            given["t_max"] = sections.default_t_max(t_star, levels)
    return given


@lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    return Config().model_dump(mode="json")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split one `--set section.key=value`; the value is read as YAML. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text}: expected section.key=value, for example purify.t_star=100")
    if not value.strip():
        raise ConfigError(f"--set {text}: no value is given; write one, or null; is a shell variable not set?")
    return key.strip(), _of_yaml(value, f"--set {text}")


def to_yaml(config: Config) -> str:
    """Return the resolved settings as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def digest(value: Any) -> str:
    """Return the first 16 hex digits of SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_hash(pixels: NDArray[np.uint8]) -> str:
    """Return 32 hex digits of SHA-256 over shape and uint8 pixels, which do not depend on the encoding."""
    shape = "x".join(str(side) for side in pixels.shape)
    return hashlib.sha256(f"{shape}:".encode() + pixels.tobytes()).hexdigest()[:32]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as {"a.b": value}, for differences people can read."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + ".") if isinstance(value, Mapping) else {path: value})
    return flat


_WORDS: dict[str, list[str]] = {
    f"{section}.{name}": [word for one in get_args(kind) if get_origin(one) is Literal for word in get_args(one)]
    for section in Config.model_fields
    for name, kind in get_type_hints(Config.model_fields[section].annotation, include_extras=True).items()
    if sections.Location in get_args(kind)
} | {"poison.source": []}
LOCATIONS = frozenset(_WORDS)
"""Every setting that is a location; of the last one an entry of matrix.poisons has some."""


def locations(config: Config, read: Set[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of every location of `config` that is among `read`.

    "matrix" in `read` stands for the locations of a grid, those in its entries included, where there is a grid.
    """
    grid = "matrix" in read and config.matrix.on
    if grid:
        read = read | {"purify.denoiser", "poison.denoiser", "poison.source"}
    # The file of data.labels is about data.source, and without that about every set.
    about = (None, config.data.clean, config.denoiser.against)
    if "data.source" in read or ("data.clean" in read and config.data.source in about):
        read = read | {"data.labels"}
    named = [("", flatten(config.model_dump(mode="json")))]
    for axis, section in (("poisons", "poison"), ("defenses", "defense")) if grid else ():
        for item in getattr(config.matrix, axis):
            own = item if isinstance(item, dict) else {}
            full = {key if "." in key else f"{section}.{key}": value for key, value in own.items()}
            named.append((f"matrix.{axis}: ", full))
    for where, settings in named:
        for key in LOCATIONS & read & settings.keys():
            if isinstance(settings[key], str) and settings[key] not in _WORDS[key]:
                yield where + key, settings[key]


def require_everywhere(who: str, location: str) -> None:
    """Raise ConfigError, which begins with `who`, for a relative path: no other machine finds what it names."""
    # Of fsspec's chains (zip://x::PATH) the last link is the file.
    path = location.rpartition("::")[2] if "://" in location else location
    path = re.sub("^(file|local)://", "", path)
    if "://" not in path and not os.path.isabs(path):
        raise ConfigError(
            f"{who}{location} is a path of this machine; name a URL, or the full path of a folder that every node "
            "of the cluster sees"
        )


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line "a.b: old -> new" for every setting that differs."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


class _Loader(yaml.SafeLoader):
    """Values as people mean them: a key stands once, and 2024-05-06, 010 and 1:30 are text.

    In YAML 1.1 these are a date, the number 8 and the number 90. A setting that wants a number reads 010 as 10.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        date, *numbers = (f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))
        as_written = tag == date or (tag in numbers and re.match(r"[-+]?0[0-9_]+$|.*:", value))
        return self.DEFAULT_SCALAR_TAG if as_written and implicit[0] else tag

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if (name := str(key.value)) in lines:
                problem = f"{name} is there already, on line {lines[name]}; join them or delete one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node in self.recursive_objects:
            raise yaml.MarkedYAMLError(problem="this value holds itself", problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError):
            problem = f"{str(node.value)[:50]!r} is no !!{node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None


def _of_yaml(text: str, where: str) -> Any:
    """Return what `text` holds as YAML. Raises ConfigError with `where`, the line, and what is wrong there."""
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}: not valid YAML: line {mark.line + 1 if mark else 1}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: not valid YAML: no text has the character {error.character:#x}") from None


def _parsed_yaml(file: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        text = read(file).decode()
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file{did_you_mean(file)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: this is a folder; name a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: this is no text in UTF-8; name a YAML file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{file}: cannot be read: {reason}; name a YAML file") from None
    if not text.strip():
        raise ConfigError(f"{file}: the file is empty; write settings into it, or leave it out")
    tree = _of_yaml(text, file)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected sections such as `purify:`, found {type(tree).__name__}")
    # The keys of a section may all be commented out.
    return {section: {} if values is None else values for section, values in tree.items()}


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    section, separator, name = key.partition(".")
    if not separator:
        example = " or ".join(meant("", key, ())) or "purify.t_star"
        raise ConfigError(f"{key}: settings are named section.key, for example {example}")
    fields = tree.setdefault(section, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"{section}: expected a section with keys, found {fields!r}")
    fields[name] = value


def validated(model: type[Model], values: Mapping[str, Any], where: str = "") -> Model:
    """Return `values` as `model`; `where` is the section they stand in.

    Raises ConfigError that names each wrong setting, and the nearest right one.
    """
    try:
        made = model.model_validate(values)
        wrong: list[Any] = list(_numbers_of_booleans(values, made))
    except ValidationError as error:
        wrong = error.errors()
    if not wrong:
        return made
    found: dict[tuple[Any, ...], list[Any]] = {}
    for item in wrong:
        found.setdefault(_place(values, item), []).append(item)
    # A wrong entry says more than that its list is none of what may be here.
    last = [path for path in found if not any(path == one[: len(path)] != one for one in found)]
    raise ConfigError("; ".join(_explain(model, where, path, found[path]) for path in last))


def _numbers_of_booleans(values: Any, made: Any, loc: tuple[Any, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield an error for each boolean of `values` that is a number in `made`: pydantic takes true for 1."""
    if isinstance(values, bool) and not isinstance(made, bool):
        yield {"type": "float_type", "loc": loc, "input": values, "msg": ""}
    elif isinstance(values, Mapping):
        for key, value in values.items():
            known = made.get(key, value) if isinstance(made, Mapping) else getattr(made, key, value)
            yield from _numbers_of_booleans(value, known, (*loc, key))
    elif isinstance(values, list | tuple):
        for number, pair in enumerate(zip(values, made, strict=False)):
            yield from _numbers_of_booleans(*pair, (*loc, number))


def _place(values: Any, item: Any) -> tuple[Any, ...]:
    """Return where a wrong value stands: the place that pydantic says without the kinds that it tried there."""
    path: list[Any] = []
    # Of a key that is no text, what holds it.
    of_key = 2 if item["loc"][-1:] == ("[key]",) else item["type"] == "invalid_key"
    for part in item["loc"][: len(item["loc"]) - of_key]:
        if values is item["input"]:
            # What follows are kinds, which may be called like the keys of the value.
            break
        if isinstance(values, Mapping) and part in values:
            values = values[part]
            path.append(str(part))
        elif isinstance(values, list | tuple) and isinstance(part, int):
            values = values[part]
            path.append(part)
    return (*path, item["loc"][-1]) if item["type"] == "missing" else tuple(path)


def _explain(model: type[BaseModel], where: str, path: tuple[Any, ...], items: list[Any]) -> str:
    """Return a sentence for the setting at `path`, which is none of the kinds that `items` tell of."""
    said = where if path or where else "settings"
    for part in path:
        said = f"{said}, entry {part + 1}" if isinstance(part, int) else f"{said}.{part}".removeprefix(".")
    kinds, value = {item["type"]: item for item in items}, items[0]["input"]
    if "value_error" in kinds:
        text = f"{said}: {kinds['value_error']['msg'].removeprefix('Value error, ')}"
        # What a whole section holds says nothing of which of its keys disagree.
        return text if isinstance(value, dict) else f"{text}, found {value!r}"
    if "extra_forbidden" in kinds:
        name, known = str(path[-1]), _keys_at(model, path)
        within = said.removesuffix(name)
        # Only a range has keys so deep.
        close = meant(within, name, known) if len(path) < 3 else []
        close = close or [within + one for one in difflib.get_close_matches(name, known, n=1, cutoff=0.0)]
        return f"{said}: unknown setting; did you mean {' or '.join(close)}?"
    wanted = list(dict.fromkeys(map(_wanted, items)))
    if "missing" in kinds:
        return f"{said}: no value is given; write one"
    if wanted != [_NAME] and (value is None or "string_too_short" in kinds):
        return f"{said}: no value is given; write one, or leave the setting out"
    return f"{said}: expected {' or '.join(wanted)}, found {value!r}"[:500] + _advice(kinds, wanted, value)


def meant(within: str, name: str, known: Iterable[str]) -> list[str]:
    """Return the settings that an unknown `name` may mean: a like one of `known`, and those so called elsewhere.

    `within` is the section of `known` and a dot, or empty.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    sections: dict[str, Any] = {f"{key}.": field.annotation for key, field in Config.model_fields.items()}
    others = [key for key, model in sections.items() if key != within and name in model.model_fields]
    return [within + one for one in close] + [key + name for key in others]


_NAME, _TEXT, _LIST, _KEYS = "names as keys", "a text", "a list", "keys with values"
_KINDS = {"invalid": _NAME, "string": _TEXT, "tuple": _LIST, "list": _LIST, "dict": _KEYS, "model": _KEYS}
_KINDS |= {"int": "an integer", "float": "a number", "bool": "true or false"}


def _wanted(item: Any) -> str:
    """Return in words what an error of pydantic expected."""
    kind = item["type"].partition("_")[0]
    if item["type"] == "literal_error":
        return str(item["ctx"]["expected"])
    if item["type"] == "too_short":
        return f"a list of {item['ctx']['min_length']} or more"
    text = str(item["msg"]).removeprefix("Input should be ")
    number = f"a number {text}" if kind in ("greater", "less") else text
    return _NAME if item["loc"][-1] == "[key]" else _KINDS.get(kind, number)


def _advice(kinds: Mapping[str, Any], wanted: list[str], value: Any) -> str:
    """Return what to do about a value that is not what was `wanted`, if that is known."""
    if "literal_error" in kinds:
        allowed = re.findall(r"'([^']*)'", kinds["literal_error"]["ctx"]["expected"])
        if close := difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3):
            return f"; did you mean {close[0]}?"
    if isinstance(value, list | dict):
        return ""
    return "; put it into quotes" if _TEXT in wanted else f"; write [{value}]" if _LIST in wanted else ""


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the names of the settings beside the one at `path`."""
    if len(path) > 2:
        # Only a range has keys so deep.
        return list(sections.Range.model_fields)
    section: Any = model.model_fields[path[0]].annotation if len(path) == 2 else model
    return list(section.model_fields)


# Passwords and tokens have no place in settings: settings are recorded beside every output and shown in logs.

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
    names = [name for link in links for name, _ in parse_qsl(f"{link.query}&{link.fragment}")]
    return any(":" in link.netloc.rpartition("@")[0] for link in links) or any(map(is_secret_name, names))


def refuse_secrets(value: Any, path: str = "") -> None:
    """Raise ConfigError, naming the key and never the value, if any text of the settings holds a secret."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_secrets(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_secrets(item, path)
    elif isinstance(value, str) and holds_secret(value):
        raise ConfigError(
            f"{path}: the URL holds a password, token or signature, and settings are recorded; leave it out and "
            "give credentials by environment variables, a profile, or the role of the machine"
        )
