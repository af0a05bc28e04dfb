"""A real matrix on Ray, at debug size: complete, resumed, grown, and honest about sets that share images."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow.parquet as pq
import pytest

from eclipse_ray import verbs
from eclipse_ray.cluster.connect import Resources
from eclipse_ray.config import load_config, to_yaml
from eclipse_ray.datasets.images import encode_image
from eclipse_ray.datasets.memory import ImageSet, load_images
from eclipse_ray.datasets.table import canonical_table
from eclipse_ray.datasets.write import write_dataset
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.experiments import artifacts, run
from eclipse_ray.experiments.experiment import Experiment, open_matrix
from eclipse_ray.experiments.run import groups, share
from eclipse_ray.poisoning import fits_at_once
from eclipse_ray.poisons import cost_of
from tests.support import DEBUG, OneRun, change_json, dotted, kept_by_experiment, kill_and_go_on

SETTINGS = {
    **DEBUG,
    "victim.epochs": 1,
    "victim.batch_size": 32,
    "evaluate.seeds": 2,
    "matrix.poisons": ["ar", "urp"],
    "matrix.defenses": ["none", "iss-g", "eclipse"],
    "matrix.limit": 100,
    "matrix.published": "cifar10",
}


def settings_for(world, output: Path, **changes: object) -> dict[str, object]:
    places = {"data.source": world.rest, "data.test": world.test, "data.clean": world.clean}
    own = {"data.output": str(output), "purify.denoiser": world.denoiser}
    return {**SETTINGS, **places, **own, **dotted(changes)}


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory) -> OneRun:
    output = tmp_path_factory.mktemp("matrix") / "out"
    settings = settings_for(world, output)
    plan = verbs.evaluate_plan(settings=settings)
    return OneRun(settings, plan, verbs.evaluate(settings=settings), output)


def test_the_plan_names_what_is_missing_and_writes_nothing(measured, world, tmp_path):
    assert (measured.plan.cells, measured.plan.done, len(measured.plan.missing)) == (12, 0, 12)
    assert measured.plan.missing[0] == "ar, none, small, seed 0"
    assert "poison ar" in measured.plan.unknown
    verbs.evaluate_plan(settings=settings_for(world, tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_every_cell_is_measured_and_tidy(measured):
    assert (measured.result.cells, measured.result.done, measured.result.failed) == (12, 12, 0)
    rows = pq.read_table(measured.output / "results.parquet").to_pylist()
    cells = set(itertools.product(("ar", "urp"), ("none", "iss-g", "eclipse"), (0, 1)))
    assert {(row["poison"], row["defense"], row["seed"]) for row in rows} == cells
    for row in rows:
        assert (row["n"], row["sparse"], row["b_over_n"], row["test_images"]) == (100, 20, 20.0, 60)
        assert 0 <= row["test_accuracy"] <= row["best_epoch_accuracy"] <= 100
        assert (row["victim"], row["recipe"], row["epochs"]) == ("small", "quick", 1)
        assert row["budget"] == {"ar": "L2 1.000", "urp": "L-inf 8/255"}[row["poison"]]
        assert row["psnr"] > 10
        assert 0 < row["ssim"] < 1
        assert (row["images_per_second"] is None) == (row["defense"] == "none") == (row["rho"] is None)
        assert row["device"] == "CPU"
    assert len({row["fingerprint"] for row in rows}) == 12


def test_the_table_has_the_layout_of_the_paper(measured):
    text = Path(measured.result.table).read_text()
    assert "| defense | ar | urp | AVG |" in text
    assert "[87.32]" in text
    assert "0 of 12 are left" in text
    assert "B/N = 20.0 %" in text


def test_running_again_does_nothing(measured):
    before = kept_by_experiment(measured.output)
    assert verbs.evaluate(settings=measured.settings).done == 12
    assert kept_by_experiment(measured.output) == before
    assert verbs.evaluate_plan(settings=measured.settings).missing == []


@pytest.mark.chaos
def test_a_grown_grid_does_the_new_cells_only(measured, world):
    before = kept_by_experiment(measured.output)
    defenses = ["cutout", "none", "iss-g", "eclipse"]
    grown = settings_for(world, measured.output, matrix__clean=True, matrix__defenses=defenses, evaluate__seeds=1)
    plan = verbs.evaluate_plan(settings=grown)
    assert (plan.cells, plan.done) == (12, 6)
    assert plan.seconds_left > 0
    assert verbs.evaluate(settings=grown).done == 12
    after = kept_by_experiment(measured.output)
    assert after.items() >= before.items()
    assert len([name for name in after if name.startswith("results/")]) == 12 + 6


@pytest.mark.chaos
def test_a_failing_row_does_not_hold_up_the_others(measured, world):
    # 100 images are too few for a depth that the denoiser was never trained at; `none` is measured already.
    broken = {"name": "eclipse", "label": "too deep", "purify.t_star": 19}
    settings = settings_for(world, measured.output, matrix__defenses=["none", broken], evaluate__seeds=1)
    result = verbs.evaluate(settings=settings)
    assert (result.cells, result.done, result.failed) == (4, 2, 2)
    assert result.failures.keys() == {f"{poison}, too deep, small, seed 0" for poison in ("ar", "urp")}
    assert all("t_star" in message for message in result.failures.values())
    assert "2 of 4 are left" in (measured.output / "table.md").read_text()


def test_a_sparse_set_that_overlaps_is_refused_before_anything_is_written(world, tmp_path):
    """Which sets may not overlap is the rule of `evaluate` (test_evaluate.py)."""
    settings = settings_for(world, tmp_path / "out", data__clean=world.rest, purify__denoiser=None)
    with pytest.raises(InputError, match="sparse clean set and training set share"):
        verbs.evaluate(settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("of_a_row", [False, True])
def test_a_denoiser_fitted_on_the_training_images_is_refused_whatever_their_size_in_memory(
    world, tmp_path, of_a_row
):
    # The poison changes every image, so it is the clean originals that are compared.
    settings = settings_for(world, tmp_path / "out", data__source=world.clean, matrix__limit=None)
    own = {"data.clean": None, "matrix.defenses": ["none"], "data.resize": 24}
    if of_a_row:
        own["matrix.defenses"] = ["none", {"name": "eclipse", "purify.denoiser": world.denoiser}]
        own["purify.denoiser"] = None
    with pytest.raises(InputError, match="sparse clean set and training set share 20"):
        verbs.evaluate(settings={**settings, **own})


def test_rows_with_given_denoisers_are_each_measured_with_their_own(world, tmp_path):
    shutil.copytree(world.denoiser, tmp_path / "same")
    shutil.copytree(world.denoiser, tmp_path / "other")
    change_json(tmp_path / "other" / "eclipse.json", t_max=9)
    places = [world.denoiser, str(tmp_path / "same"), str(tmp_path / "other")]
    rows = [{"name": "eclipse", "label": place, "purify.denoiser": place} for place in places]
    # What the section denoiser says is of no denoiser here.
    trained = {"denoiser__t_star": 2, "denoiser__t_max": 2, "purify__t_star": 4}
    for of_all in (world.denoiser, None):
        changes = {"matrix__defenses": [*rows, "none"], "purify__denoiser": of_all, "evaluate__seeds": 1}
        grid = open_matrix(load_config(None, settings_for(world, tmp_path / "out", **changes, **trained))).grid
        first, same, other = (one.training for one in grid.recipes[:3])
        assert first == same != other


def test_a_denoiser_that_a_poison_attacks_may_be_moved_and_needs_no_clean_set(world, tmp_path):
    def column_at(place: Path) -> str:
        adp = {"name": "adp", "variant": "strong", "denoiser": str(place), "label": "adp"}
        changes = {"matrix__poisons": [adp], "matrix__defenses": ["none"], "purify__denoiser": None}
        settings = settings_for(world, tmp_path / "out", **changes, data__clean=None, poison__cost="reduced")
        (column,) = open_matrix(load_config(None, settings)).grid.columns
        return column.key

    first = column_at(world.denoiser)
    shutil.copytree(world.denoiser, tmp_path / "moved")
    assert column_at(tmp_path / "moved") == first
    change_json(tmp_path / "moved" / "eclipse.json", t_max=9)
    assert column_at(tmp_path / "moved") != first
    with pytest.raises(InputError, match="there is no such denoiser folder"):
        column_at(tmp_path / "nowhere")


def test_only_a_matrix_can_be_planned_and_a_matrix_needs_a_folder(world, tmp_path):
    with pytest.raises(ConfigError, match=r"matrix\.poisons"):
        verbs.evaluate_plan(world.rest, test=world.test)
    with pytest.raises(ConfigError, match=r"data\.output is not set"):
        verbs.evaluate_plan(settings={**settings_for(world, tmp_path), "data.output": None})


def opened(world, source: object, **changes: object) -> Experiment:
    """A matrix with one column, a poison that others published; nothing is run."""
    own = {"matrix__poisons": [{"name": "published", "source": str(source), "label": "theirs"}], **changes}
    return open_matrix(load_config(None, settings_for(world, world.root / "never", **own)))


def stored(images: ImageSet, target: Path) -> str:
    encoded = [encode_image(pixels, "png") for pixels in images.images]
    table = canonical_table(images.ids, encoded, images.labels, classes=images.classes)
    write_dataset(str(target), [table], classes=images.classes, source="test")
    return str(target)


def refused(world, images: ImageSet, folder: Path, words: str, **changes: object) -> None:
    target = stored(images, folder / f"published-{len(list(folder.iterdir()))}")
    with pytest.raises(InputError, match=f"{target}{words}"):
        opened(world, target, **changes)


@pytest.fixture(scope="module")
def theirs(world) -> ImageSet:
    return load_images(world.poisoned, load_config().data)


def matching(theirs: ImageSet, ids: list[str]) -> np.ndarray:
    return theirs.take([theirs.ids.index(name) for name in ids]).images


def test_a_published_poison_is_known_by_its_content_wherever_it_lies(world, theirs, tmp_path, monkeypatch):
    backwards = stored(theirs.take(range(239, -1, -1)), tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    first, *others = [opened(world, source).grid for source in (world.poisoned, backwards, "moved")]
    for other in others:
        assert [recipe.key for recipe in other.recipes] == [recipe.key for recipe in first.recipes]
    # Another image, or more of them, are another column.
    theirs.images[99] ^= 1
    changed = opened(world, stored(theirs, tmp_path / "changed")).grid
    theirs.images[99] ^= 1
    whole = opened(world, world.poisoned, matrix__limit=None).grid
    assert len({made.columns[0].key for made in (first, changed, whole)}) == 3


def test_a_published_poison_is_read_in_the_order_of_the_training_images(world, theirs, tmp_path):
    backwards = stored(theirs.take(range(239, -1, -1)), tmp_path / "theirs")
    experiment = opened(world, backwards)
    source = experiment.sets.source
    images, names = artifacts.load_published(backwards, source, experiment.config)
    assert names == source.ids
    assert images.ids == source.ids
    assert np.array_equal(images.images, matching(theirs, source.ids))


def test_a_published_poison_that_is_no_copy_of_the_training_images_is_refused(world, theirs, tmp_path):
    fewer = theirs.take(range(3, 240))
    refused(
        world, fewer, tmp_path, f": 3 of the 240 images of {world.rest} are missing, such as", matrix__limit=None
    )
    labels = theirs.labels.copy()
    labels[[0, 5]] = (labels[[0, 5]] + 1) % 10
    relabelled = replace(theirs, labels=labels)
    refused(world, relabelled, tmp_path, f": 2 images with another label than in {world.rest}")
    large = replace(theirs, images=np.kron(theirs.images, np.ones((1, 2, 2, 1), np.uint8)))
    refused(world, large, tmp_path, r" has \(32, 32\) images")
    with pytest.raises(InputError, match="nowhere"):
        opened(world, tmp_path / "nowhere")


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_published_poison_without_ids_or_labels_is_matched_by_content(
    world, theirs, tmp_path, capsys, limit, labelled
):
    order = np.random.default_rng(3).permutation(240)
    # Numbered in an order of their own: with the same ids in another order, only the content is right.
    ids = [f"{row}.png" for row in range(240)] if labelled else theirs.ids
    bare = {} if labelled else {"labels": None, "classes": None}
    target = stored(replace(theirs.take(order), ids=ids, **bare), tmp_path / "theirs")
    experiment = opened(world, target, matrix__limit=limit)
    assert "240 of 240 images matched with those of" in capsys.readouterr().err
    source, names = experiment.sets.source, experiment.sets.published[target]
    images, _ = artifacts.load_published(target, source, experiment.config, names)
    assert np.array_equal(images.images, matching(theirs, source.ids))
    assert images.ids == source.ids
    assert np.array_equal(images.labels, source.labels)
    # What a denoiser is trained against has the labels of the training images.
    part = artifacts.part_of(
        experiment.config, artifacts.Cache(str(tmp_path / "out")), target, names, "theirs", source
    )
    suspicious = load_images(str(part["data.source"]), load_config(None, part).data)
    place = {name: row for row, name in enumerate(suspicious.ids)}
    rows = [place[name] for name in names]
    assert np.array_equal(suspicious.labels[rows], source.labels)
    assert np.array_equal(suspicious.images[rows], images.images)
    assert suspicious.classes == source.classes
    # The column is the same as with ids and labels.
    first = opened(world, world.poisoned, matrix__limit=limit).grid
    assert [recipe.key for recipe in experiment.grid.recipes] == [recipe.key for recipe in first.recipes]


def test_a_published_poison_of_the_whole_set_leaves_out_what_was_made_of_trusted_images(
    world, theirs, tmp_path, capsys
):
    trusted = load_images(world.clean, load_config().data).take(range(20))
    kept = {"labels": None, "classes": None}
    both = np.concatenate([theirs.images, (trusted.images.astype(int) + 3).clip(0, 255).astype(np.uint8)])
    order = np.random.default_rng(5).permutation(len(both))
    ids = [f"{row}.png" for row in range(len(both))]
    target = stored(replace(theirs, images=both[order], ids=ids, **kept), tmp_path / "whole")
    experiment = opened(world, target)
    said = capsys.readouterr().err
    assert f"240 of 260 images matched with those of {world.rest}" in said
    assert f"20 were made of images of {world.clean} and are left out" in said
    sets = experiment.sets
    images, _ = artifacts.load_published(target, sets.source, experiment.config, sets.published[target])
    assert np.array_equal(images.images, matching(theirs, sets.source.ids))


def test_a_match_by_content_that_is_doubtful_or_not_whole_is_refused(world, theirs, tmp_path):
    plain = replace(theirs, ids=[f"{row}.png" for row in range(240)], labels=None, classes=None)
    fewer = plain.take(range(2, 240))
    refused(world, fewer, tmp_path, f": 2 of the 240 images of {world.rest} are missing", matrix__limit=None)
    images = plain.images.copy()
    images[7] = images[3]
    twice = replace(plain, images=images)
    refused(world, twice, tmp_path, f": 238 of 240 images match exactly one image of {world.rest}")
    foreign = replace(plain, images=np.random.default_rng(1).integers(0, 256, images.shape, np.uint8))
    refused(world, foreign, tmp_path, ": .* images match exactly one image")
    labels = theirs.labels.copy()
    labels[4] = (labels[4] + 1) % 10
    wrong = replace(plain, labels=labels, classes=theirs.classes)
    refused(world, wrong, tmp_path, f": 1 image with another label than in {world.rest}", matrix__limit=None)


@pytest.mark.parametrize(
    ("taken", "words"),
    [("test", "training and test set share 2"), ("clean", "sparse clean set and training set share 2")],
)
def test_a_published_poison_with_images_of_another_set_is_refused(world, theirs, tmp_path, taken, words):
    images = theirs.images.copy()
    images[:2] = load_images(getattr(world, taken), load_config().data).images[:2]
    leaking = replace(theirs, images=images)
    refused(world, leaking, tmp_path, f".*{words}")
    # The images that trained a given denoiser count even if nobody names them.
    if taken == "clean":
        refused(world, leaking, tmp_path, f".*{words}", data__clean=None)


@pytest.mark.chaos
def test_a_published_poison_is_a_column_like_any_other(measured, world):
    entry = {"name": "published", "source": world.poisoned}
    own = {"matrix__poisons": ["ar", entry], "evaluate__seeds": 1}
    settings = settings_for(world, measured.output, **own)
    assert verbs.evaluate_plan(settings=settings).done == 3
    result = verbs.evaluate(settings=settings)
    assert (result.cells, result.done, result.failed) == (6, 6, 0)
    found = pq.read_table(measured.output / "results.parquet").to_pylist()
    rows = {row["defense"]: row for row in found if row["poison"] == "poisoned"}
    assert rows.keys() == {"none", "iss-g", "eclipse"}
    for row in rows.values():
        assert (row["n"], row["variant"], row["budget"], row["cost"]) == (100, "", "published", "")
        assert row["poison_seconds"] is None
    # AR has the L2 norm 1: 10 log10(16 * 16 * 3) = 28.9 dB, and a little more after rounding and clipping.
    assert rows["none"]["psnr"] == pytest.approx(28.9, abs=1)
    text = (measured.output / "table.md").read_text()
    assert "poisoned: published" in text


@pytest.mark.chaos
def test_a_row_against_its_columns_trains_a_denoiser_for_each(measured, world, tmp_path):
    own = {"name": "eclipse", "label": "learned", "against": True}
    settings = settings_for(world, tmp_path / "out", matrix__poisons=["ar"], evaluate__seeds=1)
    settings |= {"matrix.clean": True, "matrix.defenses": ["none", own], "purify.denoiser": None}
    settings |= {"denoiser.iterations": 20, "denoiser.num_workers": 2}
    # As its authors publish some poisons: numbered, and without labels.
    bare = load_images(world.poisoned, load_config().data)
    bare = replace(bare, ids=[f"{row}.png" for row in range(len(bare.ids))], labels=None, classes=None)
    target = stored(bare, tmp_path / "theirs")
    settings["matrix.poisons"] = ["ar", {"name": "published", "source": target, "label": "theirs"}]
    assert "denoiser of learned" in verbs.evaluate_plan(settings=settings).unknown
    result = verbs.evaluate(settings=settings)
    assert (result.cells, result.done, result.failures) == (6, 6, {})
    cards = [json.loads(file.read_text()) for file in tmp_path.glob("out/cache/denoisers/*/eclipse.json")]
    sources = {card["settings"]["against"]["source"].split("/cache/")[1].split("/")[0] for card in cards}
    assert (len(cards), sources) == (3, {"parts", "poisons"})
    assert {card["settings"]["against"]["images"] for card in cards} == {100}
    rows = {(r["poison"], r["defense"]): r for r in pq.read_table(tmp_path / "out/results.parquet").to_pylist()}
    assert 0 < rows["ar", "learned"]["rho"] < 1.2
    assert rows["ar", "none"]["rho"] is None
    assert rows["clean", "learned"]["rho"] is None
    assert verbs.evaluate_plan(settings=settings).missing == []


def test_dilution_needs_labels(world, unlabelled, tmp_path):
    settings = settings_for(world, tmp_path / "out", matrix__defenses=["dilution"], data__clean=unlabelled)
    with pytest.raises(InputError, match="dilution needs labels"):
        verbs.evaluate_plan(settings=settings)


def test_groups_are_of_whole_columns_and_large_enough(world, tmp_path):
    cells = open_matrix(load_config(None, settings_for(world, tmp_path / "out"))).grid.recipes
    assert [len(group) for group in groups(cells, 4)] == [6, 6]
    assert [len(group) for group in groups(cells, 1)] == [3, 3, 3, 3]
    assert [len(group) for group in groups(cells, 99)] == [12]
    row = replace(cells[4].row, entry=replace(cells[4].row.entry, against=True))
    # The second column has a denoiser of its own: its cells do not wait for what the third one needs.
    cells[4] = replace(cells[4], row=row)
    assert [len(group) for group in groups(cells, 99)] == [6, 6]


def test_columns_made_at_once_are_those_made_one_by_one(measured, world, tmp_path, monkeypatch, capfd):
    """Both poisons wait for each other, which only two threads can do; they share the part and the denoiser."""
    together, ensure = Barrier(2, timeout=60), artifacts.ensure_poison

    def wait_and_ensure(*arguments):
        together.wait()
        ensure(*arguments)

    monkeypatch.setattr(run, "fits_at_once", lambda _resources: 2)
    monkeypatch.setattr(artifacts, "ensure_poison", wait_and_ensure)
    # One group holds every cell.
    monkeypatch.setattr(run, "CELLS_AHEAD", 99)
    settings = settings_for(world, tmp_path / "out", matrix__defenses=["none"], evaluate__seeds=1)
    result = verbs.evaluate(settings=settings)
    assert (result.done, result.failed) == (2, 0)
    before = {row["fingerprint"]: row for row in pq.read_table(measured.output / "results.parquet").to_pylist()}
    for row in pq.read_table(tmp_path / "out" / "results.parquet").to_pylist():
        assert row["test_accuracy"] == before[row["fingerprint"]]["test_accuracy"]
    # Only our own lines: Ray Tune's boxes, warnings and folders that are gone afterwards help nobody.
    said = capfd.readouterr()
    assert said.out == ""
    for line in said.err.splitlines():
        assert re.match(r"(matrix|poison|fit|train|transform|fitting|note)\b", line), line


def test_as_many_poisons_are_fitted_at_once_as_there_are_gpus_or_else_machines():
    assert fits_at_once(Resources(cpus=32, gpus=4, cores=16, local=False)) == 4
    assert fits_at_once(Resources(cpus=32, gpus=0, cores=8, local=False)) == 4
    assert fits_at_once(Resources(cpus=4, gpus=0, cores=2, local=True)) == 1
    assert fits_at_once(Resources(cpus=1, gpus=0, cores=2, local=True)) == 1


def test_trials_share_the_machine(world):
    two_cores = Resources(cpus=4, gpus=0, cores=2, local=True)
    assert share(load_config(), "matrix", two_cores) == (0.0, 2, 1)
    assert share(load_config(None, {"matrix.max_concurrent": 1}), "matrix", two_cores) == (0.0, 1, 2)
    gpu = Resources(cpus=32, gpus=1, cores=16, local=True)
    assert share(load_config(), "matrix", gpu) == (0.25, 4, 1)
    half = load_config(None, {"matrix.num_gpus": 0.5, "matrix.max_concurrent": 1})
    assert share(half, "matrix", gpu) == (0.5, 1, 1)
    assert share(load_config(None, {"matrix.num_gpus": 0}), "matrix", gpu) == (0.0, 16, 1)


# Three drivers and as many clusters, one of which fits the denoiser.
@pytest.mark.timeout(900)
@pytest.mark.chaos
def test_a_driver_killed_on_the_way_goes_on_with_what_is_missing(world, tmp_path):
    output = tmp_path / "out"
    file = tmp_path / "matrix.yaml"
    settings = settings_for(world, output, matrix__max_concurrent=1, purify__denoiser=None)
    file.write_text(to_yaml(load_config(None, settings)))
    result = kill_and_go_on(["evaluate", "--config", str(file)], output, 3, 12)
    assert (result["cells"], result["done"]) == (12, 12)


def test_a_wrong_entry_is_found_before_any_image_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setattr("eclipse_ray.experiments.experiment.load_images", None)
    wrong = [{"name": "em", "stepps": 3}]
    with pytest.raises(ConfigError, match=r"poison\.stepps: em has no such setting"):
        open_matrix(load_config(None, settings_for(world, tmp_path / "out", matrix__poisons=wrong)))


def test_a_quality_that_cannot_be_measured_is_said(world, tmp_path, monkeypatch, capfd):
    def no_likeness(*_given: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(run, "likeness", no_likeness)
    one = {"matrix__defenses": ["none"], "matrix__poisons": ["ar"], "evaluate__seeds": 1}
    result = verbs.evaluate(settings=settings_for(world, tmp_path / "out", **one))
    assert (result.done, result.failed) == (1, 0)
    assert "matrix: the PSNR of ar is missing: the disk is full" in capfd.readouterr().err
    (row,) = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert row["psnr"] is None


def test_only_a_poison_whose_numbers_depend_on_the_cost_has_one(world, tmp_path):
    reduced = {"poison__cost": "reduced", "matrix__poisons": [{"name": "ar", "eps_255": 128}, "em"]}
    ar, em = open_matrix(load_config(None, settings_for(world, tmp_path / "out", **reduced))).grid.columns
    assert (cost_of(ar.config.poison), cost_of(em.config.poison)) == ("", "reduced")
