"""Commands that judge a dataset: evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from eclipse_ray.cli.common import (
    DATA,
    Assignments,
    ConfigFile,
    Json,
    app,
    during_run,
    examples,
    parsed,
    show,
)
from eclipse_ray.cli.reports import NoReport, conclude
from eclipse_ray.errors import EXIT_FAILURE
from eclipse_ray.results import EvaluateResult, MatrixPlan, MatrixResult


@app.command(
    epilog=examples(
        "eclipse-ray evaluate --train my/purified --test my/test",
        "eclipse-ray evaluate --config configs/quick.yaml --dry-run",
    )
)
def evaluate(
    train: Annotated[str | None, typer.Option(metavar="SRC", help="Training set.", rich_help_panel=DATA)] = None,
    test: Annotated[
        str | None, typer.Option(metavar="SRC", help="Clean labelled test set.", rich_help_panel=DATA)
    ] = None,
    clean: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Sparse set, checked to be disjoint.", rich_help_panel=DATA),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of results; a matrix needs one.", rich_help_panel=DATA),
    ] = None,
    dry_run: Annotated[bool, during_run("--dry-run", "Matrix only: say what is missing.")] = False,
    no_report: NoReport = False,
    config: ConfigFile = None,
    assign: Assignments = None,
    as_json: Json = False,
) -> None:
    """Train victims on a dataset and print their test accuracy after the last epoch.

    With a section `matrix` in the config: poisons x defenses x victims x seeds; the same command goes on.
    """
    from eclipse_ray import api

    settings = parsed(assign)
    if dry_run:
        plan = api.evaluate_plan(train=train, test=test, clean=clean, out=out, config=config, settings=settings)
        show(plan, as_json, lambda: _describe_matrix(plan))
        return
    result = api.evaluate(train=train, test=test, clean=clean, out=out, config=config, settings=settings)
    show(result, as_json, lambda: _describe_evaluation(result))
    folder = result.output if isinstance(result, MatrixResult) else out
    if folder:
        conclude(folder, no_report)
    if isinstance(result, MatrixResult) and result.failed:
        raise typer.Exit(EXIT_FAILURE)


def _describe_evaluation(result: EvaluateResult | MatrixResult) -> str:
    if isinstance(result, MatrixResult):
        lines = [f"failed: {title}: {message}" for title, message in result.failures.items()]
        return "\n".join([*lines, f"{result.done:,} of {result.cells:,} cells measured; see {result.table}"])
    return (
        f"test accuracy {result.test_accuracy:.2f} ± {result.test_accuracy_std:.2f} % "
        f"(n = {result.seeds}, {result.victim}, {result.epochs} epochs, compensation {result.compensation})"
    )


def _describe_matrix(plan: MatrixPlan) -> str:
    unknown = f", and what was never measured here: {', '.join(plan.unknown)}" if plan.unknown else ""
    return "\n".join(
        [
            *plan.missing,
            f"{plan.done:,} of {plan.cells:,} cells are measured, {len(plan.missing):,} trainings are left: "
            f"about {plan.seconds_left / 3600:,.2f} hours on this machine{unknown}; "
            f"nothing was written to {plan.output}",
        ]
    )
