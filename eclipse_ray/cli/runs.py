"""Commands on the output folder of purify: status, verify, gc."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from eclipse_ray.cli.common import RUN, Json, app, during_run, examples, show, take_interrupts
from eclipse_ray.errors import EXIT_FAILURE, InterruptedRunError
from eclipse_ray.progress import ProgressLine
from eclipse_ray.results import StatusResult

Output = Annotated[str, typer.Argument(metavar="DST", help="Output folder of purify.")]


@app.command(epilog=examples("eclipse-ray status my/purified", "eclipse-ray status my/purified --watch"))
def status(
    output: Output,
    watch: Annotated[bool, during_run("--watch", "Look again until the run is done or you stop it.")] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.", rich_help_panel=RUN)
    ] = 5,
    as_json: Json = False,
) -> None:
    """Say how far a run is, also while it runs."""
    from eclipse_ray import api

    result = _watch(output, every) if watch else api.status(output)
    done = result.shards_done == result.shards
    show(
        result,
        as_json,
        lambda: (
            f"{result.shards_done:,} of {result.shards:,} shards, {result.ok:,} of {result.planned:,} images, "
            f"{result.failed:,} failed"
        ),
        ("verify", output) if done else () if watch else ("status", output, "--watch"),
    )


def _watch(output: str, every: float) -> StatusResult:
    """Show the run's progress until it is done or whoever watches has seen enough; return the last look."""
    from eclipse_ray import api

    take_interrupts()
    found = api.status(output)
    with ProgressLine("status", "images", found.planned, every, found.ok + found.failed) as line:
        line.failed = found.failed
        try:
            while found.shards_done < found.shards:
                time.sleep(every)
                found = api.status(output)
                line.total = found.planned
                line.advance(found.ok + found.failed - line.done, found.failed - line.failed)
        except (KeyboardInterrupt, InterruptedRunError):
            # Only the watching was stopped.
            pass
    return found


@app.command(epilog=examples("eclipse-ray verify my/purified", "eclipse-ray verify s3://out/set --json"))
def verify(output: Output, as_json: Json = False) -> None:
    """Prove from the bytes that every planned image is there once; exit 1 if not."""
    from eclipse_ray import api

    result = api.verify(output)
    lines = [*result.mismatched, f"{result.images:,} images and {result.failed:,} failures of {result.planned:,}"]
    then = ("evaluate", "--train", output, "--test", "TEST") if result.ok else ()
    show(result, as_json, lambda: "\n".join([*lines, "ok" if result.ok else "NOT ok"]), then)
    if not result.ok:
        raise typer.Exit(EXIT_FAILURE)


@app.command(epilog=examples("eclipse-ray gc my/purified", "eclipse-ray gc s3://out/set --idle"))
def gc(
    output: Output,
    idle: Annotated[
        bool, during_run("--idle", "No run is writing there: unfinished shards' leftovers go too.")
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
