"""Commands that read one dataset and write another: convert, split, poison."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eclipse_ray.cli.common import (
    DATA,
    METHOD,
    Assignments,
    ConfigFile,
    Json,
    Resize,
    app,
    examples,
    parsed,
    show,
)
from eclipse_ray.config import Layout


@app.command(
    epilog=examples(
        "eclipse-ray convert my/photographs my/parquet --resize 64",
        "eclipse-ray convert s3://bucket/tars my/folders --layout folder",
    )
)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    layout: Annotated[
        Layout, typer.Option(help="`folder` makes one folder per class.", rich_help_panel=DATA)
    ] = "parquet",
    resize: Resize = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Rewrite a dataset as canonical Parquet or in another layout; only --resize touches a pixel."""
    from eclipse_ray import api

    result = api.convert(source, output, layout=layout, resize=resize, config=config, settings=parsed(assign))
    show(result, as_json, lambda: f"{result.images:,} images written to {result.output}")


@app.command(
    epilog=examples(
        "eclipse-ray split my/dataset --clean 500 --out my/split",
        "eclipse-ray split my/dataset --clean 500 --out my/split --set run.seed=1",
    )
)
def split(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Any readable dataset.")],
    clean: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of the sparse clean set.", rich_help_panel=METHOD)
    ],
    output: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Gets DIR/clean and DIR/rest.", rich_help_panel=DATA)
    ],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Divide a dataset into a sparse clean set and the rest, disjoint by content, stratified by label."""
    from eclipse_ray import api

    result = api.split(source, clean=clean, output=output, config=config, settings=parsed(assign))
    then = ("train", "--clean", f"{result.output}/clean", "--out", f"{result.output}/denoiser")
    show(
        result,
        as_json,
        lambda: (
            f"{result.details['clean']:,} images in {output}/clean, {result.details['rest']:,} in {output}/rest"
        ),
        then,
    )


@app.command(
    epilog=examples(
        "eclipse-ray poison ar my/dataset my/poisoned",
        "eclipse-ray poison em my/dataset my/poisoned --set poison.cost=reduced",
    )
)
def poison(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="urp lsp ar cuda em tap rem sep efp adp"),
    ],
    source: Annotated[str, typer.Argument(metavar="SRC", help="Labelled dataset.")],
    output: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Write a poisoned copy of a labelled dataset, its norm checked after 8-bit storage; resumes if optimised."""
    from eclipse_ray import api

    result = api.poison(name, source, output, config=config, settings=parsed(assign))
    show(
        result,
        as_json,
        lambda: f"{result.images:,} images poisoned ({_words(result.details)}) in {result.output}",
        ("evaluate", "--train", result.output, "--test", "TEST"),
    )


def _words(details: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in details.items() if value is not None)
