"""Commands on the output folder of purify: status, verify, gc."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import Json, app, show
from eclipse_ray.errors import EXIT_FAILURE


@app.command()
def status(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")], as_json: Json = False
) -> None:
    """Say how far a run is, also while it runs."""
    from eclipse_ray import api

    result = api.status(output)
    show(
        result,
        as_json,
        lambda: (
            f"{result.shards_done:,} of {result.shards:,} shards, {result.ok:,} of {result.planned:,} images, "
            f"{result.failed:,} failed"
        ),
    )


@app.command()
def verify(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")], as_json: Json = False
) -> None:
    """Prove from the bytes that every planned image is there once; exit 1 if not."""
    from eclipse_ray import api

    result = api.verify(output)
    lines = [*result.mismatched, f"{result.images:,} images and {result.failed:,} failures of {result.planned:,}"]
    show(result, as_json, lambda: "\n".join([*lines, "ok" if result.ok else "NOT ok"]))
    if not result.ok:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def gc(
    output: Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")],
    idle: Annotated[
        bool, typer.Option("--idle", help="No run is writing there: unfinished shards' leftovers go too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove what dead workers left behind; never what a status names."""
    from eclipse_ray import api

    result = api.gc(output, idle=idle)
    show(
        result,
        as_json,
        lambda: (
            f"{result.removed:,} leftovers removed, {result.uploads_aborted:,} uploads aborted in {result.output}"
        ),
    )
