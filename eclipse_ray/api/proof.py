"""Verbs that judge and tune: evaluate, audit, sweep, report."""

from __future__ import annotations

import json

from eclipse_ray.api.settings import ConfigLike, resolve
from eclipse_ray.config import (
    Config,
    Settings,
    to_yaml,
)
from eclipse_ray.errors import ConfigError
from eclipse_ray.results import (
    EVALUATION_FILE,
    AuditResult,
    EvaluateResult,
    MatrixPlan,
    MatrixResult,
    ReportResult,
    SweepPlan,
    SweepResult,
    to_json,
)


def evaluate(
    *,
    train: str | None = None,
    test: str | None = None,
    clean: str | None = None,
    out: str | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> EvaluateResult | MatrixResult:
    """Train victims on `train` and return their accuracy on `test`; `clean` is checked to be disjoint.

    With a section `matrix` in the config, measure that grid instead, into `out`: the same call goes on with what
    is missing. What fails is left out and named in `failures`; the same call tries it again. One dataset's result
    is written to out/evaluate.json when `out` is given.
    """
    from eclipse_ray.experiments import run

    resolved = resolve(config, settings, _evaluate_settings(train, test, clean, out))
    if _is_matrix(resolved):
        from eclipse_ray.reports.tables import write_tables

        return run.matrix(resolved, write_tables)
    if out:
        _refuse_others(out)
    result = run.evaluate(resolved)
    if out:
        _keep_evaluation(out, resolved, result)
    return result


def evaluate_plan(
    *,
    train: str | None = None,
    test: str | None = None,
    clean: str | None = None,
    out: str | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> MatrixPlan:
    """Return which cells of a matrix are missing and about how long they will take; nothing is written."""
    from eclipse_ray.experiments import run

    resolved = resolve(config, settings, _evaluate_settings(train, test, clean, out))
    if not _is_matrix(resolved):
        raise ConfigError("only a matrix can be planned; list its columns in matrix.poisons")
    return run.plan_matrix(resolved)


def _evaluate_settings(
    train: str | None, test: str | None, clean: str | None, out: str | None
) -> dict[str, str | None]:
    return {"data.source": train, "data.test": test, "data.clean": clean, "data.output": out}


def _is_matrix(config: Config) -> bool:
    return bool(config.matrix.poisons) or config.matrix.clean


def _refuse_others(output: str) -> None:
    """Raise InputError if a folder holds anything but an earlier evaluation, whose settings would be lost."""
    from eclipse_ray.datasets.memory import refuse_existing
    from eclipse_ray.storage.store import Store

    store = Store(output)
    if not store.exists(EVALUATION_FILE):
        refuse_existing(store)


def _keep_evaluation(output: str, config: Config, result: EvaluateResult) -> None:
    """Leave the result and the resolved settings in a folder."""
    from eclipse_ray.storage.store import Store

    note = {**to_json(result), "train": config.data.source, "test": config.data.test}
    store = Store(output)
    store.write("_eclipse/config.yaml", to_yaml(config).encode())
    store.write(EVALUATION_FILE, json.dumps(note, indent=2).encode())


def audit(
    source: str | None = None,
    *,
    clean: str | None = None,
    denoiser: str | None = None,
    out: str | None = None,
    resize: int | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> AuditResult:
    """Say whether a labelled dataset is poisoned, how sure that is, and by what kind of poison (docs/audit.md).

    Needs no clean set; with one, more poisons are seen. With `out`, audit.json, audit.png and config.yaml are left
    there.
    """
    from eclipse_ray import auditing as room

    named = {
        "data.source": source,
        "data.clean": clean,
        "audit.denoiser": denoiser,
        "audit.output": out,
        "data.resize": resize,
    }
    resolved = resolve(config, settings, named)
    done = room.audit(resolved)
    if resolved.audit.output:
        from eclipse_ray.reports.sections import write_audit

        write_audit(resolved.audit.output, to_yaml(resolved), done.result, done.sample, done.clean)
    return done.result


def sweep(
    *,
    data: str | None = None,
    clean: str | None = None,
    denoiser: str | None = None,
    out: str | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> SweepResult:
    """Search for settings to purify `data` with, judged on clean images of `clean` that trained no denoiser.

    Writes results.parquet, best.yaml for `purify` and two pictures into `out`; the same call goes on with what is
    missing. Without `denoiser`, denoisers are trained on a part of `clean`.
    """
    from eclipse_ray.experiments import run

    try:
        from eclipse_ray.reports.sweep import write_sweep
    except ImportError:
        raise ConfigError("a sweep draws pictures: pip install 'eclipse-ray[report]'") from None
    return run.sweep(resolve(config, settings, _sweep_settings(data, clean, denoiser, out)), write_sweep)


def sweep_plan(
    *,
    data: str | None = None,
    clean: str | None = None,
    denoiser: str | None = None,
    out: str | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> SweepPlan:
    """Return which trials of a sweep are missing and about how long they take; nothing is written."""
    from eclipse_ray.experiments import run

    return run.plan_sweep(resolve(config, settings, _sweep_settings(data, clean, denoiser, out)))


def _sweep_settings(
    data: str | None, clean: str | None, denoiser: str | None, out: str | None
) -> dict[str, str | None]:
    return {"data.source": data, "data.clean": clean, "purify.denoiser": denoiser, "data.output": out}


def report(output: str) -> ReportResult:
    """Write a page on the output folder `output` (of train, purify, evaluate, sweep, audit or demo) into it.

    Raises ConfigError when the libraries for it are not installed, InputError for another folder.
    """
    try:
        from eclipse_ray.reports.page import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise ConfigError(
            f"a report needs {error.name}; install it with: pip install 'eclipse-ray[report]'"
        ) from error
    return write_report(output)
