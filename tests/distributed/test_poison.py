"""`poison` end to end on Ray: an optimised poison, SIGKILL and the same command again, refusals, spread chunks."""

import json
import subprocess
import sys

import numpy as np
import pytest

from eclipse_ray import api
from eclipse_ray.config import load_config
from eclipse_ray.data.dataset import load_images
from eclipse_ray.data.store import Store
from eclipse_ray.data.synthetic import write_synthetic
from eclipse_ray.distributed import poison as room
from eclipse_ray.distributed.poison_work import FIT_KEY, STATE_KEY
from eclipse_ray.errors import InputError, ResumeError
from tests.support import kill_when, read_output, run_cli

TINY = {
    "poison.cost": "reduced",
    "poison.surrogate_batch_size": 16,
    "poison.steps": 2,
    "poison.rounds": 12,
    "poison.round_batches": 3,
    "poison.stop_error": 0.0,
    "poison.save_seconds": 0,
    "poison.chunk_images": 16,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poison") / "source"
    write_synthetic(str(folder), 40, 16, 0)
    return str(folder)


def words(source, output, **settings) -> list[str]:
    chosen = {**TINY, **settings}
    return ["poison", "em", source, str(output), *(w for k, v in chosen.items() for w in ("--set", f"{k}={v}"))]


def test_em_killed_while_it_fits_and_run_again(source, tmp_path):
    output = tmp_path / "killed"
    ready = output / FIT_KEY
    # Long enough that the kill lands in the fit; the state that is resumed from is checked without Ray.
    kill_when(words(source, output), ready.exists, tmp_path / "log")
    assert not (output / STATE_KEY).exists()
    with pytest.raises(InputError, match="interrupted"):
        load_images(str(output), load_config().data)
    changed = [sys.executable, "-c", "from eclipse_ray.cli import main; main()"]
    refused = subprocess.run(
        [*changed, *words(source, output, **{"poison.steps": 3})], capture_output=True, text=True, timeout=100
    )
    assert refused.returncode == 2
    assert "poison.steps: 2 -> 3" in refused.stderr
    result = run_cli(*words(source, output))
    assert result["images"] == 40
    details = result["details"]
    assert {key: details[key] for key in ("poison", "variant", "norm", "eps_255", "cost")} == {
        "poison": "em",
        "variant": "sample",
        "norm": "linf",
        "eps_255": 8.0,
        "cost": "reduced",
    }
    table, clean = read_output(output), load_images(source, load_config().data)
    assert sorted(table["id"].to_pylist()) == sorted(clean.ids)
    found = load_images(str(output), load_config().data)
    assert found.ids == clean.ids
    assert np.array_equal(found.labels, clean.labels)
    moved = np.abs(found.images.astype(int) - clean.images).max()
    assert moved == details["largest_norm_255"] <= 8
    left = [entry.key for entry in Store(str(output)).list("_eclipse/poison")]
    assert left == ["_eclipse/poison/result.json", STATE_KEY]
    assert api.poison("em", source, str(output), settings=TINY).details == details, "done already: at once"
    with pytest.raises(ResumeError, match=r"run.seed: 0 -> 1"):
        api.poison("em", source, str(output), settings={**TINY, "run.seed": 1})


def test_spread_closed_forms_are_those_of_one_process(source, tmp_path, monkeypatch):
    here = api.poison("ar", source, str(tmp_path / "here"))
    monkeypatch.setattr(room, "SPREAD_CHUNKS", 1)
    monkeypatch.setattr(room, "CHUNK_IMAGES", 16)
    spread = api.poison("ar", source, str(tmp_path / "spread"))
    assert spread.details == here.details
    first, second = (load_images(str(tmp_path / name), load_config().data) for name in ("here", "spread"))
    assert first.ids == second.ids
    assert np.array_equal(first.images, second.images)
    assert json.loads(json.dumps(here.details)) == here.details
