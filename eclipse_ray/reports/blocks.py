"""The parts of a report: plain values, which the template shows and whose text it escapes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be overlooked."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it. With `numeric` all other cells are aligned right."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded away unless `open`."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    open: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing for a light and a dark page, and a PNG of the light one; files are named `name`."""

    kind: ClassVar[str] = "chart"
    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes
    png: bytes
    wide: bool = False
    """Whether the chart is wider than a phone, where it is then scrolled."""

    @property
    def light_uri(self) -> str:
        """The drawing for light pages as a data URI."""
        return data_uri(self.light, "image/svg+xml")

    @property
    def dark_uri(self) -> str:
        """The drawing for dark pages as a data URI."""
        return data_uri(self.dark, "image/svg+xml")


@dataclass(frozen=True)
class Charts:
    """Charts that stand side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Picture:
    """A PNG that was drawn elsewhere, wider than a phone."""

    kind: ClassVar[str] = "picture"
    alt: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return data_uri(self.png, "image/png")


@dataclass(frozen=True)
class Pixels:
    """A small image, enlarged pixel by pixel: PNG bytes, width and height in pixels, and words for it."""

    png: bytes
    width: int
    height: int
    alt: str

    @property
    def uri(self) -> str:
        """The image as a data URI."""
        return data_uri(self.png, "image/png")


@dataclass(frozen=True)
class Specimen:
    """One dataset image in all its versions, in the order of the gallery's rows."""

    id: str
    label: str
    versions: Sequence[Pixels]


@dataclass(frozen=True)
class Gallery:
    """Rows of versions (clean, poisoned, ...) by columns of specimens; every specimen can be enlarged."""

    kind: ClassVar[str] = "gallery"
    caption: str
    rows: Sequence[str]
    specimens: Sequence[Specimen]


@dataclass(frozen=True)
class Strip:
    """Rows of small images under common column heads, several lines each."""

    kind: ClassVar[str] = "strip"
    caption: str
    heads: Sequence[Sequence[str]]
    rows: Sequence[tuple[str, Sequence[Pixels]]]


Block = Text | Note | Heading | Table | Code | Chart | Charts | Picture | Gallery | Strip


@dataclass(frozen=True)
class Section:
    """A part of the report; `leads` are the sentences that the summary takes from it."""

    id: str
    title: str
    blocks: Sequence[Block]
    leads: Sequence[str] = field(default_factory=tuple)


def charts_of(sections: Sequence[Section]) -> list[Chart]:
    """Return every chart of the sections, in order."""
    found: list[Chart] = []
    for section in sections:
        for block in section.blocks:
            found += [block] if isinstance(block, Chart) else block.charts if isinstance(block, Charts) else []
    return found


def data_uri(data: bytes, media_type: str) -> str:
    """Return `data` as a URI that needs no network."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def value_words(value: object) -> str:
    """Return a value as text: four digits of a float, yes or no for a boolean, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
