"""What each command returns; the fields are the keys that `--json` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal


@dataclass(frozen=True)
class Result:
    """What a verb returns; a notebook shows it as a table, and every value is escaped."""

    def _repr_html_(self) -> str:
        values = vars(self)
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in values.items()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"


def _cell(value: Any) -> str:
    """Return a value as HTML: lists and mappings as lines, numbers for people, all text escaped."""
    if isinstance(value, dict):
        return "<br>".join(f"{escape(str(key))}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "<br>".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(str(value))


# What `evaluate --out` and `demo` leave in their folders.
EVALUATION_FILE, DEMO_FILE = "evaluate.json", "demo.json"


@dataclass(frozen=True)
class TrainResult(Result):
    """A trained denoiser; PSNR in dB of held-out images at t_star, denoised and before denoising."""

    iterations: int
    denoise_psnr: float
    noisy_psnr: float
    denoiser: str


@dataclass(frozen=True)
class ImportResult(Result):
    """An imported denoiser: where it lies and what was read off its tensors; `iterations` is 0 if unknown."""

    denoiser: str
    parameters: int
    block_out_channels: list[int]
    attention_levels: list[int]
    learned_range: bool
    iterations: int
    t_star: int


@dataclass(frozen=True)
class PurifyResult(Result):
    """Counts of images after a run; `images_per_second` covers only what this run did."""

    planned: int
    ok: int
    failed: int
    images_per_second: float
    output: str


@dataclass(frozen=True)
class DryRunResult(Result):
    """What `purify` would do: hours are of one CPU core (decode, encode) and of one device of the named kind."""

    planned: int
    images_left: int
    shards: int
    shards_left: int
    input_bytes: int
    output_bytes: int
    cpu_hours: float
    device_hours: float
    device: str
    output: str


@dataclass(frozen=True)
class GcResult(Result):
    """What was cleared from an output folder: leftover objects, and uploads that were never completed."""

    removed: int
    uploads_aborted: int
    output: str


@dataclass(frozen=True)
class StatusResult(Result):
    """How far a run is, in images and shards."""

    planned: int
    ok: int
    failed: int
    shards: int
    shards_done: int


@dataclass(frozen=True)
class VerifyResult(Result):
    """An audit of an output from its bytes; `mismatched` names what is wrong, one sentence each."""

    ok: bool
    planned: int
    images: int
    failed: int
    mismatched: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluateResult(Result):
    """Test accuracy (0-100) after the last epoch: mean and standard deviation over victims.

    `curves` has the test accuracy after every epoch, one list per victim.
    """

    test_accuracy: float
    test_accuracy_std: float
    seeds: int
    epochs: int
    victim: str
    best_epoch_accuracy: float
    compensation: str
    accuracies: list[float]
    curves: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class MatrixResult(Result):
    """A matrix after a run: cells that are measured, those that failed and why, the table of what there is."""

    cells: int
    done: int
    failed: int
    output: str
    table: str
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixPlan(Result):
    """What a run of a matrix would do; `seconds_left` is of work whose like was measured, `unknown` the rest."""

    cells: int
    done: int
    missing: list[str]
    seconds_left: float
    unknown: list[str]
    output: str


@dataclass(frozen=True)
class MatrixAxis:
    """A column, row or victim of a table: its label, the paper's name for it (or empty), and what it is."""

    label: str
    published: str
    details: str = ""


@dataclass(frozen=True)
class MatrixView:
    """What tables are made of: axes in order, and one tidy row for every cell that is measured."""

    columns: list[MatrixAxis]
    defenses: list[MatrixAxis]
    victims: list[MatrixAxis]
    seeds: list[int]
    dataset: str | None
    images: int
    sparse: int
    test_images: int
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class SweepResult(Result):
    """A sweep after a run: trials measured, the best settings by section, its score, and what failed and why."""

    trials: int
    best: dict[str, dict[str, Any]]
    score: float
    failed: int
    output: str
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepPlan(Result):
    """What a run of a sweep would do, timed here on a few images; `unknown` names what could not be timed."""

    trials: int
    done: int
    missing: list[str]
    purifications: int
    denoisers: int
    seconds_left: float
    unknown: list[str]
    output: str


@dataclass(frozen=True)
class SweepView:
    """What the files of a sweep are made of: a tidy row per trial, the columns that vary, best.yaml as a tree."""

    axes: list[str]
    rows: list[dict[str, Any]]
    best: dict[str, dict[str, Any]]
    summary: str


def sweep_order(stopped: bool, score: float) -> tuple[bool, float]:
    """Return the sort key of a sweep's trial, best first; one that was stopped early comes after all others."""
    return stopped, -score


@dataclass(frozen=True)
class AuditResult(Result):
    """Is a dataset poisoned, and by what; `frequency` and `scope` are None for a clean one.

    `recommended` holds t_star, p and sigma, each None for a clean set. `evidence` has one entry per score: name,
    effect, tolerance, p_value, null, detail. `words` is the verdict for people.
    """

    verdict: str
    p_value: float
    frequency: str | None
    scope: str | None
    recommended: dict[str, float | int | None]
    words: str
    images: int
    classes: int
    clean_images: int
    evidence: list[dict[str, Any]]
    output: str | None


@dataclass(frozen=True)
class DatasetResult(Result):
    """A dataset written by convert, split or poison."""

    images: int
    output: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SubmitResult(Result):
    """A job on a cluster: its status there, its exit code (null while it runs), whether it was there before."""

    submission_id: str
    status: str
    exit_code: int | None
    attached: bool


@dataclass(frozen=True)
class ReportResult(Result):
    """A report that was written: its page, and the output folder it is about."""

    report: str
    output: str


@dataclass(frozen=True)
class DemoResult(Result):
    """Test accuracies (0-100) of the demo's victims."""

    clean: float
    poisoned: float
    purified: float
    images_per_second: float
    seconds: float
    output: str


@dataclass(frozen=True)
class Check:
    """One thing that doctor looked at: what it found, and what to do about it, empty if nothing."""

    name: str
    verdict: Literal["ok", "warning", "failed"]
    found: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorResult(Result):
    """Whether machine, cluster and store are fit for a run; `ok` is false if a check failed."""

    ok: bool
    checks: list[Check]
