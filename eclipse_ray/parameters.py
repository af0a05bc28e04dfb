"""How a verb declares its parameters, how they and the settings read in words, and the settings of one call.

The annotation of a parameter holds its type, its help and, if it sets a setting, the name of that setting, from
which range and default come. The command line (cli.py) and the reference (tools/pages.py) are made from these
declarations: a positional parameter is an argument there, a keyword is an option of the same name. A parameter
that has no `Parameter` exists in Python only.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from eclipse_ray.config import Config, Settings, holds_secret, load_config, with_overrides
from eclipse_ray.errors import ConfigError
from eclipse_ray.log import set_format

P = ParamSpec("P")
R = TypeVar("R")

# Groups of options in --help, in the order in which people ask: where, how, by what means, in which form.
DATA, METHOD, RUN, OUTPUT = "Data", "Method", "Run", "Settings and output"
PLACES = ("SRC", "DST", "DIR", "FILE")


@dataclass(frozen=True)
class Parameter:
    """What the command line and the reference say about a parameter, besides its name, type and default.

    `setting` is the setting that it sets, which gives the help unless there is another one. `option` is its name
    on the command line where that differs. `pair` reads one NAME=VALUE of an option that fills a mapping. The
    metavar of a location is one of PLACES, after words that the value may be instead.
    """

    help: str = ""
    metavar: str | None = None
    setting: str = ""
    panel: str = DATA
    minimum: float | None = None
    option: str = ""
    pair: Callable[[str], tuple[str, Any]] | None = None


@dataclass(frozen=True)
class Verb:
    """A function as a command, its group in --help and its examples.

    `report`: it leaves a report in its output folder. `here`: it works on files of this machine, so it cannot be
    submitted. `interruptible`: it decides itself what Ctrl-C means. `also`: locations that it reads besides those
    of its parameters, see `config.locations`.
    """

    function: Callable[..., Any]
    group: str
    examples: tuple[str, ...]
    report: bool = False
    here: bool = False
    interruptible: bool = False
    also: tuple[str, ...] = ()

    @property
    def reads(self) -> set[str]:
        """The settings that it has parameters for, and those of `also`: it reads the locations among them."""
        return {one.setting for _, one in declared(self.function).values()}.union(self.also)


VERBS: dict[str, Verb] = {}
"""All verbs by their name on the command line; filled by the functions of verbs.py."""
PLANS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""The dry runs, by the function of the verb."""


def verb(
    group: str,
    *examples: str,
    report: bool = False,
    here: bool = False,
    interruptible: bool = False,
    also: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a verb. Examples are what follows `eclipse-ray VERB`; a test parses them, and wants two."""

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__.replace("_", "-")
        lines = tuple(f"eclipse-ray {name} {example}".rstrip() for example in examples)
        VERBS[name] = Verb(function, group, lines, report, here, interruptible, also)
        return function

    return declare


def submittable(name: str) -> Verb:
    """Return a verb that a cluster can run. Raises ConfigError for any other name."""
    known = {one: found for one, found in VERBS.items() if not found.here}
    if name not in known:
        raise ConfigError(f"submit {name}: expected one of {', '.join(known)}")
    return known[name]


def plan_of(verb: Callable[P, Any]) -> Callable[[Callable[[Config, dict[str, Any]], R]], Callable[P, R]]:
    """Make a function the dry run of a verb: it gets the resolved settings and the arguments by name."""

    def declare(body: Callable[[Config, dict[str, Any]], R]) -> Callable[P, R]:
        @functools.wraps(body)
        def plan(*arguments: P.args, **keywords: P.kwargs) -> R:
            bound = signature.bind(*arguments, **keywords)
            bound.apply_defaults()
            return body(resolved(verb, bound.arguments), bound.arguments)

        signature = inspect.signature(verb)
        returned = inspect.signature(body).return_annotation
        vars(plan)["__signature__"] = signature.replace(return_annotation=returned)
        PLANS[verb] = plan
        return plan

    return declare


@functools.cache
def declared(verb: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Parameter]]:
    """Return the parameters of a verb that the command line has too, with plain types, and their declarations."""
    found = {}
    for name, one in inspect.signature(verb, eval_str=True).parameters.items():
        if get_origin(one.annotation) is Annotated:
            plain, declaration = get_args(one.annotation)
            found[name] = (one.replace(annotation=plain), declaration)
    return found


ConfigLike = Config | str | None


def resolved(verb: Callable[..., Any], given: Mapping[str, Any]) -> Config:
    """Return the settings of a call of `verb` with the arguments `given`: the named ones override the others."""
    check_arguments(verb, given)
    named = {one.setting: given[name] for name, (_, one) in declared(verb).items() if one.setting}
    return resolve(given["config"], given["settings"], named)


def check_arguments(verb: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a text of `given` that is empty, or that cannot be written down in UTF-8."""
    for name, (parameter, one) in declared(verb).items():
        option = one.option or f"--{name.replace('_', '-')}"
        said = option if parameter.kind is parameter.KEYWORD_ONLY else f"{one.metavar} ({name})"
        value = given.get(name)
        for text in value if isinstance(value, list | tuple) else [value]:
            if text == "":
                raise ConfigError(f"{said}: expected a value, found an empty text; is a shell variable not set?")
            if isinstance(text, str) and text.encode(errors="replace").decode() != text:
                raise ConfigError(f"{said}: {text!a} is not valid Unicode (UTF-8); rename it")


def resolve(config: ConfigLike, settings: Settings | None, named: Settings) -> Config:
    """Return the settings of one call: `config` <- `settings` <- those of `named` that are not None.

    A config file may lie at a path or any fsspec URL. From here on messages have the form of run.log_format.
    """
    overrides = {**(settings or {}), **{key: value for key, value in named.items() if value is not None}}
    if isinstance(config, Config):
        found = with_overrides(config, overrides)
    else:
        found = load_config(config, overrides, _read_anywhere)
    set_format(found.run.log_format)
    _check_files(found)
    return found


def _check_files(config: Config) -> None:
    """Check what is set of the settings that poisons and defenses declare in their files, which import torch."""
    if config.poison.model_extra:
        from eclipse_ray.poisons import check_poison

        check_poison(config.poison)
    if config.defense.model_extra:
        from eclipse_ray.defenses import resolved_defense

        resolved_defense(config.defense)


def _read_anywhere(url: str) -> bytes:
    if "://" not in url:
        return Path(url).read_bytes()
    from eclipse_ray.storage.store import Store

    if holds_secret(url):
        raise ConfigError("--config: the URL holds a password or token; give credentials by environment variables")
    return Store(url).read()


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
    field = section_fields(section)[name]
    default = field.get_default(call_default_factory=True)
    plain = list(default) if isinstance(default, tuple) else default
    shown = default if isinstance(default, str) else yaml.safe_dump(plain, default_flow_style=True)
    return Described(
        key, _kind(field.annotation), _bounds(field), shown.removesuffix("...\n").strip(), field.description or ""
    )


def describe_section(section: str) -> list[Described]:
    """Return all settings of a section in words, in order."""
    return [describe(f"{section}.{name}") for name in section_fields(section)]


def section_fields(section: str) -> dict[str, FieldInfo]:
    """Return the fields of a section of the configuration by name."""
    model: Any = Config.model_fields[section].annotation
    return dict(model.model_fields)


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
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
