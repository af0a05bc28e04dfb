"""The method's own commands: demo, train, import-checkpoint, purify."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import (
    DATA,
    METHOD,
    RUN,
    Assignments,
    ConfigFile,
    Json,
    Resize,
    app,
    during_run,
    examples,
    parsed,
    setting,
    show,
)
from eclipse_ray.cli.reports import NoReport, conclude
from eclipse_ray.config import ScheduleName
from eclipse_ray.errors import EXIT_TOO_MANY_FAILED
from eclipse_ray.results import DryRunResult, PurifyResult


@app.command(
    epilog=examples("eclipse-ray demo", "eclipse-ray demo --output runs/short --set denoiser.iterations=100")
)
def demo(
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for everything the demo makes.", rich_help_panel=DATA)
    ] = "runs/demo",
    no_report: NoReport = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Poison a synthetic dataset, train a denoiser, purify, evaluate: a table and one picture."""
    from eclipse_ray.demonstration import demo as run
    from eclipse_ray.demonstration import demo_table

    result = run(output, config=config, settings=parsed(assign))
    then = ("split", "SRC", "--clean", "500", "--out", "DIR")
    show(result, as_json, lambda: demo_table(result), then)
    conclude(result.output, no_report)


@app.command(
    epilog=examples(
        "eclipse-ray train --clean my/trusted --out my/denoiser",
        "eclipse-ray train --clean my/trusted --out my/den --set denoiser.preset=paper",
    )
)
def train(
    clean: Annotated[
        str | None, typer.Option(metavar="SRC", help="Sparse clean set: trusted images.", rich_help_panel=DATA)
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the denoiser.", rich_help_panel=DATA)
    ] = None,
    resize: Resize = None,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Fit a denoiser on a sparse clean set; the same command resumes."""
    from eclipse_ray import api

    result = api.train(clean=clean, out=out, resize=resize, config=config, settings=parsed(assign))
    show(
        result,
        as_json,
        lambda: (
            f"denoiser in {result.denoiser}: {result.denoise_psnr:.2f} dB on held-out images "
            f"(noised: {result.noisy_psnr:.2f} dB) after {result.iterations:,} iterations"
        ),
        ("purify", "SRC", "DST", "--denoiser", result.denoiser),
    )
    conclude(result.denoiser, no_report=True)


@app.command(
    "import-checkpoint",
    epilog=examples(
        "eclipse-ray import-checkpoint ema_0.9999_250000.pt --out my/denoiser",
        "eclipse-ray import-checkpoint 64x64_diffusion.pt --out my/denoiser --heads 1",
    ),
)
def import_checkpoint(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="State dict, such as ema_0.9999_250000.pt."),
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the denoiser.", rich_help_panel=DATA)],
    heads: Annotated[
        int, typer.Option(min=1, help="Attention heads, which the file does not tell.", rich_help_panel=METHOD)
    ] = 4,
    timesteps: Annotated[int, typer.Option(min=2, help="T of the training.", rich_help_panel=METHOD)] = 4000,
    schedule: Annotated[
        ScheduleName, typer.Option(help="Noise schedule of it.", rich_help_panel=METHOD)
    ] = "cosine",
    as_json: Json = False,
) -> None:
    """Make a denoiser of weights saved by improved-diffusion or guided-diffusion."""
    from eclipse_ray import api

    result = api.import_checkpoint(file, out=out, heads=heads, timesteps=timesteps, schedule=schedule)
    show(
        result,
        as_json,
        lambda: (
            f"denoiser in {result.denoiser}: {result.parameters:,} parameters, channels "
            f"{result.block_out_channels}, attention at levels {result.attention_levels}, "
            f"recommended t_star {result.t_star}"
        ),
        ("purify", "SRC", "DST", "--denoiser", result.denoiser),
    )


@app.command(
    epilog=examples(
        "eclipse-ray purify my/dataset my/purified --denoiser my/denoiser",
        "eclipse-ray purify s3://in/set s3://out/set --denoiser s3://out/denoiser",
        "eclipse-ray purify my/dataset my/purified --denoiser my/denoiser --dry-run",
    )
)
def purify(
    source: Annotated[str | None, typer.Argument(metavar="SRC", help="Dataset to purify.")] = None,
    output: Annotated[str | None, typer.Argument(metavar="DST", help="Output folder.")] = None,
    denoiser: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the denoiser.", rich_help_panel=DATA)
    ] = None,
    resize: Resize = None,
    dry_run: Annotated[bool, during_run("--dry-run", "Only say what would be done.")] = False,
    retry_failed: Annotated[bool, during_run("--retry-failed", "Do failed images again.")] = False,
    extend: Annotated[bool, during_run("--extend", "Also do objects that SRC has gained.")] = False,
    max_failed_fraction: Annotated[
        float | None, setting("purify.max_failed_fraction", "--max-failed-fraction", panel=RUN)
    ] = None,
    single_writer: Annotated[
        bool | None,
        during_run("--single-writer", "DST has no conditional writes, and nobody else writes there."),
    ] = None,
    no_report: NoReport = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Purify a dataset; the same command resumes, and more failed images than allowed end in exit 3."""
    from eclipse_ray import api

    named = {"purify.max_failed_fraction": max_failed_fraction, "purify.single_writer": single_writer}
    resolved = api.resolve(config, parsed(assign), named)
    if dry_run:
        plan = api.dry_run(source, output, denoiser=denoiser, resize=resize, extend=extend, config=resolved)
        show(plan, as_json, lambda: _describe(plan))
        return
    result = api.purify(
        source,
        output,
        denoiser=denoiser,
        resize=resize,
        retry_failed=retry_failed,
        extend=extend,
        config=resolved,
    )
    show(result, as_json, lambda: _told(result), ("verify", result.output))
    conclude(result.output, no_report)
    if result.failed > resolved.purify.max_failed_fraction * result.planned:
        raise typer.Exit(EXIT_TOO_MANY_FAILED)


def _told(result: PurifyResult) -> str:
    rate = result.images_per_second
    speed = f"{rate:,.1f} images/s" if rate else "all before this run"
    return (
        f"{result.ok:,} of {result.planned:,} images purified, {result.failed:,} failed, {speed}, "
        f"in {result.output}"
    )


def _describe(plan: DryRunResult) -> str:
    return (
        f"{plan.images_left:,} of {plan.planned:,} images to purify, in {plan.shards_left:,} of {plan.shards:,} "
        f"shards, from {plan.input_bytes / 2**30:,.2f} GiB; about {plan.output_bytes / 2**30:,.2f} GiB to write, "
        f"{plan.device_hours:,.2f} hours on one such {plan.device} as here, {plan.cpu_hours:,.2f} core hours to "
        f"decode and encode; nothing was written to {plan.output}"
    )
