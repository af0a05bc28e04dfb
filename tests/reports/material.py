"""Output folders of every kind, made without Ray, so that tests of reports are quick."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from eclipse_ray import ledger
from eclipse_ray.config import Config, load_config, to_yaml
from eclipse_ray.detection import Images
from eclipse_ray.purification.plan import prepare
from eclipse_ray.purification.stages import Purifier, Task, encode_and_commit, read_and_decode, task_rows
from eclipse_ray.reports.experiments import write_sweep
from eclipse_ray.reports.page import write_audit
from eclipse_ray.reports.tables import write_tables
from eclipse_ray.results import AuditResult, EvaluateResult
from tests.reports.test_sweep import ROWS
from tests.reports.test_sweep import view as swept
from tests.reports.test_tables import FULL, view
from tests.support import World


def purify_here(source: str, output: str, denoiser: str, shards: int | None = None, **settings: object) -> None:
    """Purify the first `shards` shards (None: all) in this process, stage by stage as Ray would call them."""
    named = {"data.source": source, "data.output": output, "purify.denoiser": denoiser}
    prepared = prepare(load_config(None, {**named, **settings}))
    prepared.claim()
    job = replace(prepared.job, session="here")
    purifier = Purifier(job)
    for shard in prepared.plan.shards[:shards]:
        encode_and_commit(purifier(read_and_decode(task_rows([Task(shard)])[0], job)), job)
    if shards is None:
        ledger.finalise(prepared.store)


def evaluation() -> EvaluateResult:
    """What `evaluate` would return for two victims."""
    return EvaluateResult(
        61.5, 0.71, 2, 3, "small", 62.0, "augment", [62.0, 61.0], [[30, 55, 62.0], [35, 58, 61.0]]
    )


def write_evaluation(folder: Path) -> None:
    """Write the folder of `evaluate --out`."""
    note = {**asdict(evaluation()), "train": "sets/<purified>", "test": "sets/test"}
    _write(folder, {"evaluate.json": json.dumps(note), "_eclipse/config.yaml": to_yaml(Config())})


def write_matrix(folder: Path) -> None:
    """Write the folder of a matrix, with the epochs of one of its cells."""
    rows = [row | {"fingerprint": f"{index:016x}"} for index, row in enumerate(FULL)]
    write_tables(str(folder), view(rows))
    results = {f"results/{row['fingerprint']}.json": json.dumps({"test_accuracy": [20.0, 60.0]}) for row in rows}
    config = to_yaml(load_config(None, {"matrix.published": "cifar10"}))
    _write(folder, {**results, "_eclipse/config.yaml": config})


def audited(folder: Path, source: str | None = None) -> None:
    """Write the folder of `audit --out` of `source` for a small sample of noise."""
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    score = {
        "name": "autocorrelation",
        "effect": 0.84,
        "tolerance": 0.05,
        "p_value": 0.0001,
        "null": "mirror images are equally likely",
        "detail": "tells the class of 76.7 % of images by it, 50.0 % by chance",
    }
    words = f"Likely poisoned: high frequency, class-wise (p = 0.0007). autocorrelation: {score['detail']}."
    advice = {"t_star": 100, "p": 0.4, "sigma": 0.05}
    result = AuditResult(
        "poisoned", 0.0007, "high", "class", advice, words, 24, 2, 0, evidence=[score], output=str(folder)
    )
    config = load_config(None, {"data.source": source} if source else {})
    write_audit(str(folder), to_yaml(config), result, Images(images, torch.arange(24) % 2), None)


def write_demo(folder: Path) -> None:
    """Write what the demo leaves beside its folders."""
    each = dict.fromkeys(("clean", "poisoned", "purified"), asdict(evaluation()))
    note = {"clean": 93.7, "poisoned": 14.9, "purified": 88.9, "output": str(folder), "victims": each}
    _write(folder, {"demo.json": json.dumps(note), "demo.png": ""})


def write_folders(root: Path, world: World) -> dict[str, Path]:
    """Write one folder of every kind below `root`."""
    found = {kind: root / kind for kind in ("purify", "train", "evaluate", "matrix", "demo", "sweep", "audit")}
    purify_here(world.poisoned, str(found["purify"]), world.denoiser, **{"purify.shard_images": 60})
    shutil.copytree(world.denoiser, found["train"])
    write_evaluation(found["evaluate"])
    write_matrix(found["matrix"])
    beside = {"poisoned": world.poisoned, "denoiser": world.denoiser, "split/rest": world.rest}
    for name, source in {**beside, "purified": found["purify"]}.items():
        shutil.copytree(source, found["demo"] / name)
    write_demo(found["demo"])
    write_sweep(str(found["sweep"]), swept(ROWS, ["t_star", "sigma"]))
    audited(found["audit"])
    return found


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
