"""One function a verb, with the same names and defaults as the command line.

Every function takes `config` (a Config, or the path of a YAML file) and `settings` ({"section.key": value}), which
override it; arguments named here override both. Ray is imported by the verbs that need it, when they are called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eclipse_ray import log
from eclipse_ray.config import (
    Config,
    Layout,
    ScheduleName,
    Settings,
    holds_secret,
    load_config,
    to_yaml,
    with_overrides,
)
from eclipse_ray.errors import ConfigError
from eclipse_ray.results import (
    EVALUATION_FILE,
    AuditResult,
    DatasetResult,
    DoctorResult,
    DryRunResult,
    EvaluateResult,
    GcResult,
    ImportResult,
    MatrixPlan,
    MatrixResult,
    PurifyResult,
    ReportResult,
    StatusResult,
    SubmitResult,
    SweepPlan,
    SweepResult,
    TrainResult,
    VerifyResult,
    to_json,
)

ConfigLike = Config | str | None


def resolve(config: ConfigLike, settings: Settings | None, named: Settings) -> Config:
    """Return the settings of one call: `config` <- `settings` <- those of `named` that are not None.

    A config file may lie at a path or any fsspec URL. From here on messages have the form of run.log_format.
    """
    overrides = {**(settings or {}), **{key: value for key, value in named.items() if value is not None}}
    if isinstance(config, Config):
        resolved = with_overrides(config, overrides)
    else:
        resolved = load_config(config, overrides, _read_anywhere)
    log.set_format(resolved.run.log_format)
    return resolved


def _read_anywhere(url: str) -> bytes:
    if "://" not in url:
        return Path(url).read_bytes()
    from eclipse_ray.data.store import Store

    if holds_secret(url):
        raise ConfigError("--config: the URL holds a password or token; give credentials by environment variables")
    return Store(url).read()


def convert(
    source: str,
    output: str,
    *,
    layout: Layout = "parquet",
    resize: int | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Rewrite a dataset as canonical Parquet or in another layout; only `resize` touches pixels."""
    from eclipse_ray.data import transform as room

    named = {"data.source": source, "data.output": output, "data.resize": resize}
    resolved = resolve(config, settings, named)
    images = room.convert(source, output, resolved.data, layout)
    return _recorded(resolved, DatasetResult(images, output))


def split(
    source: str,
    *,
    clean: int,
    output: str,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Divide a dataset into output/clean and output/rest, disjoint by content, stratified by label."""
    from eclipse_ray.data import transform as room

    resolved = resolve(config, settings, {"data.source": source, "data.output": output})
    counts = room.split(source, output, clean, resolved.run.seed, resolved.data)
    sizes = {"clean": int(counts["clean"]), "rest": int(counts["rest"])}
    return _recorded(resolved, DatasetResult(sum(sizes.values()), output, dict(sizes)))


def poison(
    name: str,
    source: str,
    output: str,
    *,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DatasetResult:
    """Write a copy of a labelled dataset poisoned by `name`, its norm checked; the same call resumes.

    urp, lsp, ar and cuda are closed forms; em, tap, rem, sep, efp and adp are optimised over the whole dataset, as
    published or with poison.cost "reduced" for a CPU (docs/poisons.md).
    """
    from eclipse_ray.distributed import poison as room
    from eclipse_ray.poisons.costs import resolved_poison

    named = {"poison.name": name, "data.source": source, "data.output": output}
    resolved = resolve(config, settings, named)
    resolved = resolved.model_copy(update={"poison": resolved_poison(resolved.poison)})
    return _recorded(resolved, room.poison(resolved))


def train(
    *,
    clean: str | None = None,
    out: str | None = None,
    resize: int | None = None,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> TrainResult:
    """Fit a denoiser on the sparse clean set `clean` and write it to `out`; the same call resumes."""
    from eclipse_ray.distributed import train as room

    named = {"data.clean": clean, "denoiser.output": out, "data.resize": resize}
    return room.train(resolve(config, settings, named))


def import_checkpoint(
    file: str,
    *,
    out: str,
    heads: int = 4,
    timesteps: int = 4000,
    schedule: ScheduleName = "cosine",
) -> ImportResult:
    """Turn weights of improved-diffusion or guided-diffusion, a local file, into the local denoiser `out`."""
    from eclipse_ray.diffusion import imported as room

    return room.import_checkpoint(file, out=out, heads=heads, timesteps=timesteps, schedule=schedule)


def purify(
    source: str | None = None,
    output: str | None = None,
    *,
    denoiser: str | None = None,
    resize: int | None = None,
    retry_failed: bool = False,
    extend: bool = False,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> PurifyResult:
    """Purify every image of `source` into `output`; the same call resumes what it began.

    `retry_failed` does failed images again and keeps the bytes of the others; `extend` also purifies objects that
    the source has gained since the output was begun.
    """
    from eclipse_ray.distributed import purify as room

    resolved = resolve(config, settings, _purify_settings(source, output, denoiser, resize))
    return room.purify(resolved, retry_failed=retry_failed, extend=extend)


def dry_run(
    source: str | None = None,
    output: str | None = None,
    *,
    denoiser: str | None = None,
    resize: int | None = None,
    extend: bool = False,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> DryRunResult:
    """Return what `purify` would do and about how long it would take; nothing is written, no cluster is asked."""
    from eclipse_ray.distributed import estimate as room

    return room.estimate(
        resolve(config, settings, _purify_settings(source, output, denoiser, resize)), extend=extend
    )


def _purify_settings(
    source: str | None, output: str | None, denoiser: str | None, resize: int | None
) -> dict[str, str | int | None]:
    return {
        "data.source": source,
        "data.output": output,
        "purify.denoiser": denoiser,
        "data.resize": resize,
    }


def status(output: str) -> StatusResult:
    """Say how far the run in `output` is; works while it runs."""
    from eclipse_ray import ledger
    from eclipse_ray.data.store import Store

    return ledger.summarise(Store(output))


def verify(output: str) -> VerifyResult:
    """Audit the output of a run from its bytes: counts, ids and hashes."""
    from eclipse_ray import ledger
    from eclipse_ray.data.store import Store

    return ledger.verify(Store(output))


def gc(output: str, *, idle: bool = False) -> GcResult:
    """Remove what dead workers left in an output folder; nothing that a status names is ever touched.

    `idle` promises that no run is writing there: leftovers of unfinished shards and unfinished uploads go too.
    """
    from eclipse_ray import ledger
    from eclipse_ray.data.store import Store

    store = Store(output)
    removed = ledger.collect(store, idle)
    return GcResult(removed, store.abort_uploads() if idle else 0, store.url)


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
    resolved = resolve(config, settings, _evaluate_settings(train, test, clean, out))
    if _is_matrix(resolved):
        return _measure(resolved)
    from eclipse_ray.distributed import evaluate as room

    if out:
        _refuse_others(out)
    result = room.evaluate(resolved)
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
    from eclipse_ray.distributed import matrix as room
    from eclipse_ray.distributed import tidy

    resolved = resolve(config, settings, _evaluate_settings(train, test, clean, out))
    if not _is_matrix(resolved):
        raise ConfigError("only a matrix can be planned; list its columns in matrix.poisons")
    return tidy.plan(room.open_matrix(resolved))


def _evaluate_settings(
    train: str | None, test: str | None, clean: str | None, out: str | None
) -> dict[str, str | None]:
    return {"data.source": train, "data.test": test, "data.clean": clean, "data.output": out}


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
    from eclipse_ray.distributed import sweep as room
    from eclipse_ray.distributed import sweep_view

    try:
        from eclipse_ray.report.sweep import write_sweep
    except ImportError:
        raise ConfigError("a sweep draws pictures: pip install 'eclipse-ray[report]'") from None
    opened = room.open_sweep(resolve(config, settings, _sweep_settings(data, clean, denoiser, out)))
    room.run(opened, lambda: write_sweep(opened.store.url, sweep_view.view(opened)))
    return sweep_view.result(opened)


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
    from eclipse_ray.distributed import sweep as room
    from eclipse_ray.distributed import sweep_view

    return sweep_view.plan(room.open_sweep(resolve(config, settings, _sweep_settings(data, clean, denoiser, out))))


def _sweep_settings(
    data: str | None, clean: str | None, denoiser: str | None, out: str | None
) -> dict[str, str | None]:
    return {"data.source": data, "data.clean": clean, "purify.denoiser": denoiser, "data.output": out}


def report(output: str) -> ReportResult:
    """Write a page on the output folder `output` (of train, purify, evaluate, sweep, audit or demo) into it.

    Raises ConfigError when the libraries for it are not installed, InputError for another folder.
    """
    try:
        from eclipse_ray.report.write import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise ConfigError(
            f"a report needs {error.name}; install it with: pip install 'eclipse-ray[report]'"
        ) from error
    return write_report(output)


def _is_matrix(config: Config) -> bool:
    return bool(config.matrix.poisons) or config.matrix.clean


def _measure(config: Config) -> MatrixResult:
    from eclipse_ray.distributed import matrix as room
    from eclipse_ray.distributed import tidy
    from eclipse_ray.report.tables import write_tables

    matrix = room.open_matrix(config)
    room.run(matrix, lambda: write_tables(matrix.store.url, tidy.view(matrix)))
    done = matrix.done()
    return MatrixResult(
        cells=len(matrix.grid.cells),
        done=sum(cell.key in done for cell in matrix.grid.cells),
        failed=len(matrix.failures),
        output=matrix.store.url,
        table=f"{matrix.store.url}/table.md",
        failures=matrix.failures,
    )


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
    from eclipse_ray.distributed import audit as room

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
        from eclipse_ray.report.audit import write_audit

        write_audit(resolved.audit.output, to_yaml(resolved), done.result, done.sample, done.clean)
    return done.result


def submit(
    verb: str,
    arguments: Sequence[str] = (),
    *,
    address: str | None = None,
    insecure: bool = False,
    wait: bool = True,
    again: bool = False,
    image_has_deps: bool = False,
    env: Mapping[str, str] | None = None,
    stop_on_interrupt: Callable[[str], bool] | None = None,
    show: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> SubmitResult:
    """Run a verb with its command line `arguments` on the cluster at `address`, through its jobs API.

    The same verb, arguments and settings are one run: submitted again it is joined while it runs, resumed when it
    was stopped or failed, and done anew after success only with `again`. `show` gets the log as it grows.
    """
    from eclipse_ray.distributed import submit as room

    order = room.Order(verb, tuple(arguments), resolve(config, settings, {}), again, image_has_deps, env)
    return room.submit(
        order,
        address=address,
        insecure=insecure,
        wait=wait,
        stop_on_interrupt=stop_on_interrupt,
        show=show,
    )


def _refuse_others(output: str) -> None:
    """Raise InputError if a folder holds anything but an earlier evaluation, whose settings would be lost."""
    from eclipse_ray.data.dataset import refuse_existing
    from eclipse_ray.data.store import Store

    store = Store(output)
    if not store.exists(EVALUATION_FILE):
        refuse_existing(store)


def _keep_evaluation(output: str, config: Config, result: EvaluateResult) -> None:
    """Leave the result and the resolved settings in a folder."""
    from eclipse_ray.data.store import Store

    note = {**to_json(result), "train": config.data.source, "test": config.data.test}
    store = Store(output)
    store.write("_eclipse/config.yaml", to_yaml(config).encode())
    store.write(EVALUATION_FILE, json.dumps(note, indent=2).encode())


def doctor(
    *, store: str | None = None, config: ConfigLike = None, settings: Settings | None = None
) -> DoctorResult:
    """Say whether this machine, its Ray cluster and `store` are fit for a run, and what to mend."""
    from eclipse_ray.distributed import doctor as room

    return room.doctor(resolve(config, settings, {}), store)


def _recorded(config: Config, result: DatasetResult) -> DatasetResult:
    """Leave the resolved settings beside a dataset."""
    from eclipse_ray.data.store import Store

    Store(result.output).write("_eclipse/config.yaml", to_yaml(config).encode())
    return result
