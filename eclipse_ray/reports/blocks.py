"""The parts of a report: plain values, which the template shows and whose text it escapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Text(NamedTuple):
    """A paragraph; with `note`, one that must not be overlooked."""

    text: str
    note: bool = False


class Heading(NamedTuple):
    """A heading inside a section."""

    text: str


class Facts(NamedTuple):
    """Questions of a reader, each with the sentences that answer it."""

    rows: Sequence[tuple[str, Sequence[str]]]


class Table(NamedTuple):
    """A table; the first cell of a row names it. With `numeric` all other cells are aligned right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


class Code(NamedTuple):
    """Preformatted text, folded away unless `open`."""

    title: str
    text: str
    open: bool = False


class Chart(NamedTuple):
    """A drawing for a light and a dark page as SVG, and a PNG of the light one; files are named `name`."""

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes
    png: bytes
    wide: bool = False
    """Whether the chart is wider than a phone, where it is then scrolled."""


class Charts(NamedTuple):
    """Charts that stand side by side where there is room."""

    charts: Sequence[Chart]


class Picture(NamedTuple):
    """A PNG that was drawn elsewhere, wider than a phone."""

    alt: str
    caption: str
    png: bytes


class Pixels(NamedTuple):
    """A small image, enlarged pixel by pixel: PNG bytes, width and height in pixels, and words for it."""

    png: bytes
    width: int
    height: int
    alt: str


class Specimen(NamedTuple):
    """One dataset image in all its versions, its id, its class, and a word on it."""

    id: str
    label: str
    versions: Sequence[Pixels]
    note: str = ""


class Slider(NamedTuple):
    """Specimens before and after (two versions each), all of them under one slider; `name` is unique on a page."""

    name: str
    caption: str
    specimens: Sequence[Specimen]


class Gallery(NamedTuple):
    """Rows of versions (clean, poisoned, ...) by columns of specimens; every specimen can be enlarged."""

    caption: str
    rows: Sequence[str]
    specimens: Sequence[Specimen]


Block = Text | Heading | Facts | Table | Code | Charts | Picture | Slider | Gallery


class Section(NamedTuple):
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
