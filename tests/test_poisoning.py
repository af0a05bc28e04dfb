"""`poison` end to end on Ray: an optimised poison, SIGKILL and the same command again, refusals, spread chunks."""

import json

import numpy as np
import pytest
import yaml

from eclipse_ray import poisoning as room
from eclipse_ray import verbs
from eclipse_ray.config import load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.synthetic import CLASSES, write_synthetic
from eclipse_ray.errors import InputError, ResumeError
from eclipse_ray.poisoning import FIT_KEY, STATE_KEY
from eclipse_ray.storage.store import Store
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


def test_em_on_ray_within_its_bound_and_done_once(source, tmp_path):
    output = str(tmp_path / "em")
    done = verbs.poison("em", source, output, settings=TINY)
    assert done.images == 40
    assert done.details == {
        "poison": "em",
        "classes": len(CLASSES),
        "variant": "sample",
        "scope": "sample",
        "norm": "linf",
        "eps_255": 8.0,
        "largest_norm_255": done.details["largest_norm_255"],
        "cost": "reduced",
    }
    found, clean = (load_images(name, load_config().data) for name in (output, source))
    assert found.ids == clean.ids
    assert np.array_equal(found.labels, clean.labels)
    assert np.abs(found.images.astype(int) - clean.images).max() == done.details["largest_norm_255"] <= 8
    left = [entry.key for entry in Store(output).list("_eclipse/poison")]
    assert left == ["_eclipse/poison/result.json", STATE_KEY]
    resolved = yaml.safe_load(Store(output).read("_eclipse/config.yaml"))["poison"]
    assert (resolved["surrogate"], resolved["steps"], resolved["step_size_255"]) == ("small", 2, 2.0)
    before = Store(output).entry("_eclipse/poison/result.json").version
    assert verbs.poison("em", source, output, settings=TINY) == done
    assert Store(output).entry("_eclipse/poison/result.json").version == before, "it was written again"
    with pytest.raises(ResumeError, match=r"run.seed: 0 -> 1"):
        verbs.poison("em", source, output, settings={**TINY, "run.seed": 1})


@pytest.mark.chaos
def test_em_killed_while_it_fits_and_run_again(source, tmp_path):
    output, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    kill_when(words(source, output), (output / FIT_KEY).exists, tmp_path / "log")
    assert not (output / STATE_KEY).exists(), "the kill came too late"
    with pytest.raises(InputError, match="interrupted"):
        load_images(str(output), load_config().data)
    with pytest.raises(ResumeError, match=r"poison\.steps: 2 -> 3"):
        verbs.poison("em", source, str(output), settings={**TINY, "poison.steps": 3})
    result, whole = run_cli(*words(source, output)), run_cli(*words(source, undisturbed))
    assert result["details"] == whole["details"]
    assert Store(str(output)).read(STATE_KEY) == Store(str(undisturbed)).read(STATE_KEY)
    assert read_output(output).equals(read_output(undisturbed))


def test_spread_closed_forms_are_those_of_one_process(source, tmp_path, monkeypatch):
    here = verbs.poison("ar", source, str(tmp_path / "here"))
    monkeypatch.setattr(room, "SPREAD_CHUNKS", 1)
    monkeypatch.setattr(room, "CHUNK_IMAGES", 16)
    spread = verbs.poison("ar", source, str(tmp_path / "spread"))
    assert spread.details == here.details
    first, second = (load_images(str(tmp_path / name), load_config().data) for name in ("here", "spread"))
    assert first.ids == second.ids
    assert np.array_equal(first.images, second.images)
    assert json.loads(json.dumps(here.details)) == here.details
