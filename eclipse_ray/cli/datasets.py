"""Commands that read one dataset and write another: convert, split, poison."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import Assignments, ConfigFile, Json, Resize, app, parsed, show
from eclipse_ray.config import Layout


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    layout: Annotated[Layout, typer.Option(help="folder: one a class; cifar: 32 x 32 only.")] = "parquet",
    resize: Resize = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Rewrite a dataset as canonical Parquet or in another layout; only --resize touches a pixel."""
    from eclipse_ray import api

    result = api.convert(source, output, layout=layout, resize=resize, config=config, settings=parsed(assign))
    show(result, as_json, lambda: f"{result.images:,} images written to {result.output}")


@app.command()
def split(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    clean: Annotated[int, typer.Option(help="Images of the sparse clean set.")],
    output: Annotated[str, typer.Option("--out", metavar="DIR", help="Gets DIR/clean and DIR/rest.")],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Divide a dataset into a sparse clean set and the rest, disjoint by content, stratified by label."""
    from eclipse_ray import api

    result = api.split(source, clean=clean, output=output, config=config, settings=parsed(assign))
    show(result, as_json, lambda: f"{result.images:,} images: {result.details}")


@app.command()
def poison(
    name: Annotated[str, typer.Argument(metavar="NAME", help="urp lsp ar cuda em tap rem sep efp adp")],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Labelled dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Write a poisoned copy of a labelled dataset, its norm checked after 8-bit storage; resumes if optimised."""
    from eclipse_ray import api

    result = api.poison(name, source, output, config=config, settings=parsed(assign))
    show(result, as_json, lambda: f"{result.images:,} images poisoned ({result.details}) in {result.output}")
