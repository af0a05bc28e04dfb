"""The parts of a report: plain values, which the template shows and whose text it escapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A paragraph; with `note`, one that must not be overlooked."""

    text: str
    note: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Questions of a reader, each with the sentences that answer it."""

    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it. With `numeric` all other cells are aligned right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded away unless `open`."""

    title: str
    text: str
    open: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing for a light and a dark page as SVG, and a PNG of the light one; files are named `name`."""

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes
    png: bytes
    wide: bool = False
    """Whether the chart is wider than a phone, where it is then scrolled."""


@dataclass(frozen=True)
class Charts:
    """Charts that stand side by side where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A PNG that was drawn elsewhere, wider than a phone."""

    alt: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Pixels:
    """A small image, enlarged pixel by pixel: PNG bytes, width and height in pixels, and words for it."""

    png: bytes
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Specimen:
    """One dataset image in all its versions, its id, its class, and a word on it."""

    id: str
    label: str
    versions: Sequence[Pixels]
    note: str = ""


@dataclass(frozen=True)
class Slider:
    """Specimens before and after (two versions each), all of them under one slider; `name` is unique on a page."""

    name: str
    caption: str
    specimens: Sequence[Specimen]


@dataclass(frozen=True)
class Gallery:
    """Rows of versions (clean, poisoned, ...) by columns of specimens; every specimen can be enlarged."""

    caption: str
    rows: Sequence[str]
    specimens: Sequence[Specimen]


Block = Text | Heading | Facts | Table | Code | Charts | Picture | Slider | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the report; `leads` are the sentences that the summary takes from it."""

    id: str
    title: str
    blocks: Sequence[Block]
    leads: Sequence[str] = ()


def value_words(value: object) -> str:
    """Return a value as text: four digits of a float, yes or no for a boolean, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
