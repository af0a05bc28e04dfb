"""`poison`: its worker without Ray (state in the output, exact resume, chunks), and end to end on Ray."""

import json

import numpy as np
import pytest
import torch
import yaml

from eclipse_ray import poisoning as room
from eclipse_ray import verbs
from eclipse_ray.config import DataConfig, load_config
from eclipse_ray.datasets.formats import chunk_spans, open_source
from eclipse_ray.datasets.images import decode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.synthetic import CLASSES, write_synthetic
from eclipse_ray.diffusion.checkpoint import CARD_FILE
from eclipse_ray.errors import ConfigError, InputError, ResumeError
from eclipse_ray.poisoning import FIT_KEY, STATE_KEY, PoisonJob, chunk_key, fit_stored, largest_norm, poison_chunk
from eclipse_ray.storage.store import Store
from tests.poisons.helpers import CPU, Killed, tiny_config
from tests.support import assignments, kill_when, read_output, run_cli

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = DataConfig()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poison") / "source"
    write_synthetic(str(folder), 40, 16, 0)
    return str(folder)


def job(source, output, **settings):
    found = open_source(source, DATA)
    poison = tiny_config(**{"name": "em", "save_seconds": 0, **settings})
    return PoisonJob(source, found, len(CLASSES), str(output), poison, seed=0)


def quiet(_done, _total, _note):
    return None


def killing(after):
    def report(done, _total, _note):
        if done == after:
            raise Killed

    return report


@pytest.mark.parametrize("name", ["em", "tap"])
def test_a_killed_fit_goes_on_from_the_output_to_the_same_state(source, tmp_path, name):
    whole = fit_stored(job(source, tmp_path / "whole", name=name), quiet, CPU)
    killed = job(source, tmp_path / "killed", name=name)
    store = Store(killed.output)
    with pytest.raises(Killed):
        fit_stored(killed, killing(2), CPU)
    assert store.exists(FIT_KEY)
    assert not store.exists(STATE_KEY)
    steps = []
    resumed = fit_stored(killed, lambda done, _total, _note: steps.append(done), CPU)
    assert steps == [3]
    assert all(np.array_equal(resumed[key], value) for key, value in whole.items())
    assert store.read(STATE_KEY) == Store(str(tmp_path / "whole")).read(STATE_KEY)
    assert not store.exists(FIT_KEY)
    again = fit_stored(killed, killing(1), CPU)
    assert again.keys() == whole.keys(), "a finished fit is not fitted again"


def test_states_are_saved_at_most_so_often(source, tmp_path):
    patient = job(source, tmp_path / "out", save_seconds=3600)
    with pytest.raises(Killed):
        fit_stored(patient, killing(2), CPU)
    assert not Store(patient.output).exists(FIT_KEY)


def test_chunks_are_the_whole_and_are_kept(source, tmp_path, monkeypatch):
    done = job(source, tmp_path / "out", store_perturbation=True)
    state = fit_stored(done, quiet, CPU)
    spans = list(chunk_spans(open_source(source, DATA).parts, 16, 2**30))
    tables = [poison_chunk(done, number, chunk, state) for number, chunk in enumerate(spans)]
    assert [table.num_rows for table in tables] == [16, 16, 8]
    clean = load_images(source, DATA)
    ids = [name for table in tables for name in table["id"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    assert ids == clean.ids
    assert labels == clean.labels.tolist()
    rows = [row for table in tables for row in table.to_pylist()]
    images = np.stack([decode_image(row["image"]["bytes"], 10**6) for row in rows])
    stored = np.stack([np.frombuffer(row["perturbation"], "<i2").reshape(16, 16, 3) for row in rows])
    assert np.array_equal(stored, images.astype(np.int16) - clean.images)
    worst = max(largest_norm(table)["largest_norm_255"] for table in tables)
    assert worst == np.abs(stored).max()
    assert 4 <= worst <= 8
    assert largest_norm(tables[0])["norm"] == "linf"
    assert largest_norm(tables[0])["eps_255"] == 8
    # A chunk that is there is read, not made.
    monkeypatch.setattr(room, "read_parts", None)
    assert poison_chunk(done, 1, spans[1], state).equals(tables[1])
    assert Store(done.output).exists(chunk_key(2))


def test_a_taken_column_name_is_named(source, tmp_path):
    first = job(source, tmp_path / "first", name="urp", store_perturbation=True)
    spans = list(chunk_spans(open_source(source, DATA).parts, 64, 2**30))
    table = poison_chunk(first, 0, spans[0], None)
    assert table["perturbation"].null_count == 0
    with pytest.raises(InputError, match="leave it out"):
        room._with_perturbations(first, table.select(["perturbation"]), [], [])


def test_l2_norms_are_measured_in_their_own_norm(source, tmp_path):
    spans = list(chunk_spans(open_source(source, DATA).parts, 64, 2**30))
    norm = largest_norm(poison_chunk(job(source, tmp_path / "ar", name="ar"), 0, spans[0], None))
    assert norm["norm"] == "l2"
    assert norm["eps_255"] == 255
    assert 0.8 * 255 < norm["largest_norm_255"] < 255 + np.sqrt(16 * 16 * 3) / 2
    free = largest_norm(poison_chunk(job(source, tmp_path / "cuda", name="cuda"), 0, spans[0], None))
    assert (free["norm"], free["eps_255"]) == ("none", None)
    assert free["largest_norm_255"] > 8


def test_images_of_two_sizes_cannot_be_fitted(source, tmp_path):
    write_synthetic(str(tmp_path / "other"), 8, 20, 1)
    (tmp_path / "mixed").mkdir()
    for name, folder in (("a", source), ("b", str(tmp_path / "other"))):
        Store(str(tmp_path / "mixed")).write(f"{name}.parquet", Store(folder).read("data/part-00000.parquet"))
    with pytest.raises(InputError, match="differ in size"):
        fit_stored(job(str(tmp_path / "mixed"), tmp_path / "out"), quiet, CPU)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("adp", {"variant": "strong"}, r"poison\.denoiser: adp .*; name its folder"),
        ("adp", {"variant": "strong", "t_star": 6, "denoiser": "given"}, r"poison\.t_star 6: .* up to 5"),
        ("adp", {"variant": "strong", "surrogate": "unet"}, "surrogate unet: this poison wants small or resnet18"),
        ("adp", {"surrogate": "small"}, "surrogate small: this poison wants unet"),
        ("em", {"surrogate": "unet"}, "surrogate unet: this poison wants small or resnet18"),
    ],
)
def test_what_a_fit_would_refuse_is_refused_before_ray_starts(
    name, settings, sentence, source, tmp_path, monkeypatch
):
    card = {"t_max": 5, "t_star": 4, "num_inference_steps": 1, "iterations": 1, "sparse_images": 0}
    card |= {"sparse_hashes": [], "fingerprint": "", "settings": {}}
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / CARD_FILE).write_text(json.dumps(card))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "connect", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=sentence):
        verbs.poison(name, source, "out", settings={f"poison.{key}": value for key, value in settings.items()})
    assert not (tmp_path / "out").exists()


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


def words(source, output, **settings) -> list[str]:
    return ["poison", "em", source, str(output), *assignments({**TINY, **settings})]


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
