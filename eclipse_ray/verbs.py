"""The verbs: one function for each, which declares its parameters; `eclipse_ray` offers all of them.

The functions stand in the order of `eclipse-ray --help`. `config` is a Config, or the path or URL of a YAML file;
`settings` ({"section.key": value}) override it; arguments override both. Heavy libraries are imported by the verbs
that need them, when they are called.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from eclipse_ray import results
from eclipse_ray.config import (
    Config,
    Half,
    Layout,
    Rounding,
    ScheduleName,
    Settings,
    Unit,
    parse_assignment,
    to_yaml,
)
from eclipse_ray.errors import ConfigError
from eclipse_ray.parameters import (
    METHOD,
    OUTPUT,
    PLANS,
    RUN,
    VERBS,
    ConfigLike,
    Parameter,
    check_arguments,
    plan_of,
    resolve,
    resolved,
    verb,
)
from eclipse_ray.progress import ProgressLine

# Parameters that several verbs share.

ConfigFile = Annotated[ConfigLike, Parameter("YAML file with settings.", "FILE", panel=OUTPUT)]
Assignments = Annotated[
    Settings | None,
    Parameter(
        "Override one setting; repeat for more.",
        "SECTION.KEY=VALUE",
        panel=OUTPUT,
        option="--set",
        pair=parse_assignment,
    ),
]
Resize = Annotated[
    int | None, Parameter("Resize the central square of every image to N pixels", "N", "data.resize", METHOD)
]
Strict = Annotated[bool | None, Parameter(setting="data.strict")]
OutputFolder = Annotated[str, Parameter("Output folder of purify.", "DST", "data.output")]
ResultFolder = Annotated[str | None, Parameter("Folder of results.", "DIR", "data.output")]
DenoiserFolder = Annotated[str, Parameter("Folder of the denoiser.", "DIR", "denoiser.output")]
ReadableSource = Annotated[str, Parameter("Any readable dataset.", "SRC", "data.source")]
LabelledSource = Annotated[str, Parameter("Labelled dataset.", "SRC", "data.source")]
NewFolder = Annotated[str, Parameter("New folder.", "DST", "data.output")]


@verb("Start here", "", "--store s3://bucket/purified")
def doctor(
    *,
    store: Annotated[
        str | None, Parameter("Folder for outputs to test; one object is written and removed.", "DIR")
    ] = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DoctorResult:
    """Say whether machine, Ray cluster and store are fit for a run, and what to mend; exit 1 if not."""
    from eclipse_ray.cluster import doctor as room

    return room.doctor(resolved(doctor, locals()), store)


@verb("Start here", "", "--out runs/short --set denoiser.iterations=100", report=True, here=True)
def demo(
    *,
    out: Annotated[str, Parameter("Folder for everything the demo makes.", "DIR")] = "runs/demo",
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DemoResult:
    """Poison a synthetic dataset, train a denoiser, purify, evaluate: a table and one picture.

    Running it again keeps everything that was made with the same settings.
    """
    from eclipse_ray import demonstration as room

    check_arguments(demo, locals())
    return room.demo(out, config=config, settings=settings)


@verb(
    "Purify",
    "--clean my/trusted --out my/denoiser",
    "--clean my/trusted --against my/dataset --out my/denoiser",
    "--clean my/trusted --out my/den --set denoiser.preset=paper",
)
def train(
    *,
    clean: Annotated[str | None, Parameter("Sparse clean set: trusted images.", "SRC", "data.clean")] = None,
    against: Annotated[
        str | None, Parameter("Labelled dataset to purify, to learn its poison.", "SRC", "denoiser.against")
    ] = None,
    out: Annotated[str | None, Parameter("Folder of the denoiser.", "DIR", "denoiser.output")] = None,
    resize: Resize = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.TrainResult:
    """Fit a denoiser on a sparse clean set; running it again resumes."""
    from eclipse_ray import training as room

    return room.train(resolved(train, locals()))


@verb(
    "Purify",
    "my/dataset my/purified --denoiser my/denoiser",
    "s3://in/set s3://out/set --denoiser s3://out/denoiser",
    "my/dataset my/purified --denoiser my/denoiser --dry-run",
    report=True,
)
def purify(
    source: Annotated[str | None, Parameter("Dataset to purify.", "SRC", "data.source")] = None,
    output: Annotated[str | None, Parameter("Output folder.", "DST", "data.output")] = None,
    *,
    denoiser: Annotated[str | None, Parameter("Folder of the denoiser.", "DIR", "purify.denoiser")] = None,
    resize: Resize = None,
    retry_failed: Annotated[bool, Parameter("Process failed images again, keep all others.", panel=RUN)] = False,
    extend: Annotated[bool, Parameter("Also process objects that were added to SRC.", panel=RUN)] = False,
    max_failed_fraction: Annotated[
        float | None, Parameter(panel=RUN, setting="purify.max_failed_fraction")
    ] = None,
    single_writer: Annotated[bool | None, Parameter(panel=RUN, setting="purify.single_writer")] = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.PurifyResult:
    """Purify a dataset; running it again resumes, and more failed images than allowed end in exit 3."""
    from eclipse_ray.purification import run as room

    return room.purify(resolved(purify, locals()), retry_failed=retry_failed, extend=extend)


@plan_of(purify)
def purify_plan(config: Config, given: dict[str, Any]) -> results.DryRunResult:
    """Return what `purify` would do and about how long it would take; nothing is written, no cluster is asked."""
    from eclipse_ray.purification import plan as room

    return room.estimate(config, retry_failed=given["retry_failed"], extend=given["extend"])


@verb("Purify", "my/purified", "my/purified --watch", interruptible=True)
def status(
    output: OutputFolder,
    *,
    watch: Annotated[bool, Parameter("Repeat until the run is done or you stop it.", panel=RUN)] = False,
    every: Annotated[float, Parameter("Seconds between two looks, with watch.", panel=RUN, minimum=0.1)] = 5,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.StatusResult:
    """Say how far a run is, also while it runs."""
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    resolved(status, locals())
    look = partial(ledger.summarise, Store(output))
    return _watched(look, every) if watch else look()


def _watched(look: Callable[[], results.StatusResult], every: float) -> results.StatusResult:
    """Show the progress of a run until it is done or the user stops watching; return the last look."""
    found = look()
    with ProgressLine("status", "images", found.planned, every, found.ok + found.failed) as line:
        line.failed = found.failed
        # Ctrl-C stops only the watching.
        with suppress(KeyboardInterrupt):
            while found.shards_done < found.shards:
                time.sleep(every)
                found = look()
                line.total = found.planned
                line.advance(found.ok + found.failed - line.done, found.failed - line.failed)
    return found


@verb("Purify", "my/purified", "s3://out/set --json")
def verify(
    output: OutputFolder, *, config: ConfigFile = None, settings: Assignments = None
) -> results.VerifyResult:
    """Prove from the bytes that every planned image is there once; exit 1 if not."""
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    resolved(verify, locals())
    return ledger.verify(Store(output))


@verb("Purify", "my/purified", "s3://out/set --idle")
def gc(
    output: OutputFolder,
    *,
    idle: Annotated[
        bool, Parameter("No run is writing there: files and uploads of unfinished shards go too.", panel=RUN)
    ] = False,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.GcResult:
    """Remove files that dead workers left behind; never one that a status names."""
    from eclipse_ray import ledger
    from eclipse_ray.storage.store import Store

    resolved(gc, locals())
    store = Store(output)
    removed = ledger.collect(store, idle)
    return results.GcResult(removed, store.abort_uploads() if idle else 0, store.url)


@verb("Judge and tune", "my/dataset", "my/dataset --clean my/trusted --out my/audit", report=True)
def audit(
    source: Annotated[str | None, Parameter("Labelled dataset.", "SRC", "data.source")] = None,
    *,
    clean: Annotated[str | None, Parameter("Clean set of the same kind, disjoint.", "SRC", "data.clean")] = None,
    denoiser: Annotated[
        str | None, Parameter("Also test what this denoiser removes.", "DIR", "audit.denoiser")
    ] = None,
    out: Annotated[str | None, Parameter("Folder for audit.json and audit.png.", "DIR", "audit.output")] = None,
    resize: Resize = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.AuditResult:
    """Say whether a dataset is poisoned, how sure that is, and by what kind of poison.

    No clean set is needed, but with one more poisons are detected.
    """
    from eclipse_ray import auditing as room

    found = resolved(audit, locals())
    if not found.audit.output:
        return room.audit(found).result
    with _pictures():
        from eclipse_ray.reports.page import write_audit
    done = room.audit(found)
    write_audit(found.audit.output, to_yaml(found), done.result, done.sample, done.clean)
    return done.result


@contextmanager
def _pictures() -> Iterator[None]:
    """Turn a failed import of what draws pictures and pages into a ConfigError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise ConfigError(f"a report needs {error.name}: pip install 'eclipse-ray[report]'") from error


@verb(
    "Judge and tune",
    "my/purified --test my/test",
    "--config configs/quick.yaml --dry-run",
    report=True,
    also=("matrix",),
)
def evaluate(
    source: Annotated[str | None, Parameter("Training set.", "SRC", "data.source")] = None,
    *,
    test: Annotated[str | None, Parameter("Clean labelled test set.", "SRC", "data.test")] = None,
    clean: Annotated[str | None, Parameter("Sparse set, checked to be disjoint.", "SRC", "data.clean")] = None,
    out: ResultFolder = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.EvaluateResult | results.MatrixResult:
    """Train victims on a dataset and print their test accuracy after the last epoch.

    With a section matrix in the config: poisons x defenses x victims x seeds, into a folder of results.
    Running it again measures what is missing or has failed.
    """
    found = resolved(evaluate, locals())
    if not found.matrix.on:
        return _evaluated(found)
    from eclipse_ray.experiments import run
    from eclipse_ray.reports.tables import write_tables

    return run.matrix(found, write_tables)


@plan_of(evaluate)
def evaluate_plan(config: Config, given: dict[str, Any]) -> results.MatrixPlan:
    """Return which cells of a matrix are missing and about how long they will take; nothing is written."""
    from eclipse_ray.experiments import rows

    if not config.matrix.on:
        raise ConfigError("only a matrix can be planned; list its columns in matrix.poisons")
    return rows.matrix_plan(config)


def _evaluated(config: Config) -> results.EvaluateResult:
    """Judge one dataset; leave the result and the resolved settings in data.output, if it is set.

    Raises InputError if that folder holds anything but an earlier evaluation, whose settings would be lost.
    """
    from eclipse_ray.datasets.write import refuse_existing
    from eclipse_ray.experiments import run
    from eclipse_ray.storage.store import Store

    store = Store(config.data.output) if config.data.output else None
    if store and not store.exists(results.EVALUATION_FILE):
        refuse_existing(store)
    elif store:
        store.require_writable()
    result = run.evaluate(config)
    if store:
        note = {**asdict(result), "train": config.data.source, "test": config.data.test}
        store.write("_eclipse/config.yaml", to_yaml(config).encode())
        store.write(results.EVALUATION_FILE, json.dumps(note, indent=2).encode())
    return result


@verb(
    "Judge and tune",
    "my/data --clean my/held --denoiser my/den --out sweep",
    "--config configs/sweep-quick.yaml --dry-run",
    report=True,
)
def sweep(
    source: Annotated[str | None, Parameter("Labelled dataset to purify later.", "SRC", "data.source")] = None,
    *,
    clean: Annotated[str | None, Parameter("Sparse clean set.", "SRC", "data.clean")] = None,
    denoiser: Annotated[
        str | None,
        Parameter("Denoiser; without it, some are trained on a part of the clean set.", "DIR", "purify.denoiser"),
    ] = None,
    out: ResultFolder = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.SweepResult:
    """Search for the best settings to purify a dataset, without a test set; running it again resumes.

    Settings are judged on clean images that trained no denoiser. The folder of results gets results.parquet, two
    pictures, and best.yaml for purify.
    """
    from eclipse_ray.experiments import run

    found = resolved(sweep, locals())
    with _pictures():
        from eclipse_ray.reports.experiments import write_sweep
    return run.sweep(found, write_sweep)


@plan_of(sweep)
def sweep_plan(config: Config, given: dict[str, Any]) -> results.SweepPlan:
    """Return which trials of a sweep are missing and about how long they take; nothing is written."""
    from eclipse_ray.experiments import rows

    return rows.sweep_plan(config)


@verb("Judge and tune", "my/purified", "my/purified --audit my/audit-before --audit my/audit-after", here=True)
def report(
    output: Annotated[
        str, Parameter("Output of train, purify, evaluate, sweep, audit or demo.", "DIR", "data.output")
    ],
    *,
    audits: Annotated[
        list[str] | None,
        Parameter("Folder of an audit of what was purified, or of the result.", "DIR", option="--audit"),
    ] = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.ReportResult:
    """Write DIR/report/index.html: one page, complete in itself, on what an output folder holds."""
    with _pictures():
        from eclipse_ray.reports.page import write_report
    resolved(report, locals())
    return write_report(output, audits or ())


@verb(
    "Datasets and weights", "my/photographs my/parquet --resize 64", "s3://bucket/tars my/folders --layout folder"
)
def convert(
    source: ReadableSource,
    output: NewFolder,
    *,
    layout: Annotated[
        Layout, Parameter("folder: one folder per class; npy, pt, pkl: files as published.")
    ] = "parquet",
    labels_from: Annotated[
        str | None, Parameter("Clean set whose labels its poisoned images get, matched by content.", "SRC")
    ] = None,
    resize: Resize = None,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DatasetResult:
    """Rewrite a dataset as canonical Parquet or in another layout; only resizing changes pixels."""
    from eclipse_ray.datasets import matching, write

    found = resolved(convert, locals())
    if labels_from is None:
        return _recorded(found, results.DatasetResult(write.convert(source, output, found.data, layout), output))
    done = matching.labels_from(source, labels_from, output, found.data, layout)
    details = {"matched": done.images, "margin": done.margin}
    return _recorded(found, results.DatasetResult(done.images, output, details))


@verb(
    "Datasets and weights",
    "perturbation.pt my/clean my/poisoned",
    "noise.pkl my/clean my/poisoned --round truncate",
)
def apply(
    delta: Annotated[str, Parameter("Perturbation that others published: .pt, .pth, .pkl or .npy.", "FILE")],
    source: Annotated[str, Parameter("The clean images that it belongs to.", "SRC", "data.source")],
    output: NewFolder,
    *,
    half: Annotated[Half, Parameter("positive drops negative values, as the loader of EM does.", panel=METHOD)] = (
        "signed"
    ),
    rounding: Annotated[
        Rounding, Parameter("To 8 bits: nearest, or truncate as most loaders do.", panel=METHOD, option="--round")
    ] = "nearest",
    index: Annotated[
        str,
        Parameter(
            "order: row i belongs to image i; class: to label i; or a file of image numbers.",
            "order|class|FILE",
            panel=METHOD,
        ),
    ] = "order",
    unit: Annotated[
        Unit, Parameter("What a value of 1 is; auto recognises it from the values.", panel=METHOD)
    ] = "auto",
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DatasetResult:
    """Add a published perturbation to its clean images, and print the norm that 8-bit storage leaves."""
    from eclipse_ray.datasets import perturbation

    found = resolved(apply, locals())
    done = perturbation.apply(
        delta,
        source,
        output,
        found.data,
        half=half,
        rounding=rounding,
        index=index,
        seed=found.run.seed,
        unit=unit,
    )
    details = {key: value for key, value in asdict(done).items() if key not in ("images", "output")}
    return _recorded(found, results.DatasetResult(done.images, output, details))


@verb(
    "Datasets and weights",
    "my/dataset --clean 500 --out my/split",
    "my/dataset --clean 500 --out my/split --set run.seed=1",
)
def split(
    source: ReadableSource,
    *,
    clean: Annotated[int, Parameter("Images of the sparse clean set.", "N", panel=METHOD, minimum=1)],
    out: Annotated[str, Parameter("Folder for DIR/clean and DIR/rest.", "DIR", "data.output")],
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DatasetResult:
    """Divide a dataset into a sparse clean set and the rest, disjoint by content, stratified by label."""
    from eclipse_ray.datasets import write as room

    found = resolved(split, locals())
    counts = room.split(source, out, clean, found.run.seed, found.data)
    sizes = {"clean": int(counts["clean"]), "rest": int(counts["rest"])}
    return _recorded(found, results.DatasetResult(sum(sizes.values()), out, dict(sizes)))


@verb(
    "Datasets and weights",
    "ar my/dataset my/poisoned",
    "em my/dataset my/poisoned --set poison.cost=reduced",
    also=("poison.denoiser",),
)
def poison(
    name: Annotated[str, Parameter("Its name, such as ar or em (docs/poisons.md).", "NAME", "poison.name")],
    source: LabelledSource,
    output: NewFolder,
    *,
    strict: Strict = None,
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.DatasetResult:
    """Write a poisoned copy of a labelled dataset, its norm checked after 8-bit storage; resumes if optimised."""
    from eclipse_ray import poisoning as room
    from eclipse_ray.poisons import resolved_poison

    found = resolved(poison, locals())
    found = found.model_copy(update={"poison": resolved_poison(found.poison)})
    return _recorded(found, room.poison(found))


def _recorded(config: Config, result: results.DatasetResult) -> results.DatasetResult:
    """Leave the resolved settings beside a dataset."""
    from eclipse_ray.storage.store import Store

    Store(result.output).write("_eclipse/config.yaml", to_yaml(config).encode())
    return result


@verb(
    "Datasets and weights",
    "ema_0.9999_250000.pt --out my/denoiser",
    "64x64_diffusion.pt --out my/denoiser --heads 1",
    here=True,
)
def import_checkpoint(
    file: Annotated[str, Parameter("State dict, such as ema_0.9999_250000.pt.", "FILE")],
    *,
    out: DenoiserFolder,
    heads: Annotated[
        int, Parameter("Attention heads; the file does not contain it.", panel=METHOD, minimum=1)
    ] = 4,
    timesteps: Annotated[int, Parameter("T in training.", panel=METHOD, minimum=2)] = 4000,
    schedule: Annotated[ScheduleName, Parameter("Noise schedule in training.", panel=METHOD)] = "cosine",
    config: ConfigFile = None,
    settings: Assignments = None,
) -> results.ImportResult:
    """Make a denoiser of weights saved by improved-diffusion or guided-diffusion."""
    from eclipse_ray.diffusion import improved_diffusion as room

    resolved(import_checkpoint, locals())
    return room.import_checkpoint(file, out=out, heads=heads, timesteps=timesteps, schedule=schedule)


def _variable(text: str) -> tuple[str, str]:
    """Split one --env NAME=VALUE. Raises ConfigError."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ConfigError(f"--env {name}: expected NAME=VALUE")
    return name, value


def _pass_on(text: str) -> None:
    """Print a part of a job's log; where that is not possible, the job is still followed to its end."""
    with suppress(OSError):
        print(text, end="", flush=True)


@verb(
    "On a cluster",
    "purify --config s3://bucket/run.yaml",
    "train --config s3://bucket/run.yaml --no-wait",
    here=True,
    interruptible=True,
)
def submit(
    verb: Annotated[str, Parameter("Another command, followed by its arguments.", "VERB")],
    arguments: Sequence[str] = (),
    *,
    address: Annotated[
        str | None, Parameter("Dashboard, http://host:8265; else RAY_API_SERVER_ADDRESS.", "URL", panel=RUN)
    ] = None,
    insecure: Annotated[bool, Parameter("Submit to a cluster without tokens.", panel=RUN)] = False,
    image_has_deps: Annotated[
        bool, Parameter("Install nothing: the nodes have torch and the rest.", panel=RUN)
    ] = False,
    env: Annotated[
        Mapping[str, str] | None,
        Parameter(
            "Variable of the job and its workers; repeat for more.", "NAME=VALUE", panel=RUN, pair=_variable
        ),
    ] = None,
    wait: Annotated[bool, Parameter("Do not wait for the end.", panel=RUN, option="--no-wait")] = True,
    again: Annotated[bool, Parameter("Run it again although it succeeded before.", panel=RUN)] = False,
    stop_on_interrupt: Callable[[str], bool] | None = None,
    show: Callable[[str], None] = _pass_on,
    config: ConfigLike = None,
    settings: Settings | None = None,
) -> results.SubmitResult:
    """Run a command on a Ray cluster: follow its log, end with its exit code.

    Submitted again, a run is joined while it runs and resumed if it was stopped. Ctrl-C asks whether to stop it;
    off a terminal it goes on.
    """
    from eclipse_ray.cluster import jobs as room

    check_arguments(submit, locals())
    order = room.Order(verb, tuple(arguments), resolve(config, settings, {}), again, image_has_deps, env)
    return room.submit(
        order, address=address, insecure=insecure, wait=wait, stop_on_interrupt=stop_on_interrupt, show=show
    )


PUBLIC = [function.__name__ for function in (*(one.function for one in VERBS.values()), *PLANS.values())]
"""What `eclipse_ray` offers of this module."""
