"""A real sweep at debug size: what it measures, shares, resumes and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from eclipse_ray import verbs
from eclipse_ray.config import Config, load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.diffusion.checkpoint import read_card
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.experiments import rows as tidy
from eclipse_ray.experiments import run
from eclipse_ray.experiments.experiment import Experiment, Sets, of_classes, open_sweep, sweep_notes, sweep_sets
from eclipse_ray.experiments.recipe import Measured
from eclipse_ray.experiments.run import Bench, defend, measure
from eclipse_ray.experiments.search import Trial
from tests.support import DEBUG, OneRun, board_of, dotted, kept_by_experiment, kill_and_go_on, train_denoiser

SETTINGS = {
    **DEBUG,
    "victim.epochs": 2,
    "victim.batch_size": 32,
    "sweep.images": 40,
    "sweep.space": {"purify.t_star": [2, 4], "compensation.sigma": [0.0, 0.05]},
}


@pytest.fixture(scope="module")
def half(world, tmp_path_factory) -> str:
    """A denoiser trained on half of the sparse set."""
    folder = tmp_path_factory.mktemp("half")
    verbs.split(world.clean, clean=10, out=str(folder / "sets"), settings=DEBUG)
    train_denoiser(str(folder / "sets/clean"), str(folder / "denoiser"))
    return str(folder / "denoiser")


def settings_for(world, output: Path, denoiser: str | None, **changes: object) -> dict[str, object]:
    places = {"data.source": world.poisoned, "data.clean": world.clean, "data.output": str(output)}
    own = {"purify.denoiser": denoiser}
    return {**SETTINGS, **places, **own, **dotted(changes)}


def opened(world, denoiser: str | None = None, **changes: object) -> Experiment:
    """A sweep of which nothing is run."""
    return open_sweep(load_config(None, settings_for(world, world.root / "never", denoiser, **changes)))


def sets_of(world, denoiser: str | None = None, **changes: object) -> Sets:
    return sweep_sets(load_config(None, settings_for(world, world.root / "never", denoiser, **changes)))


def measured_here(sweep: Experiment, trial: Trial) -> Measured:
    """What the first victim of a trial gives, in this process."""
    bench = Bench(sweep.sets, sweep.cache, 1, 0.1)
    for need in trial.recipes[0].needs:
        defend(need, bench, None)
    return measure(trial.recipes[0], bench, None, board_of(lambda entry: None))


@pytest.fixture(scope="module")
def swept(world, half, tmp_path_factory) -> OneRun:
    output = tmp_path_factory.mktemp("sweep") / "out"
    settings = settings_for(world, output, half)
    plan = verbs.sweep_plan(settings=settings)
    assert not output.exists()
    return OneRun(settings, plan, verbs.sweep(settings=settings), output)


def test_the_denoisers_of_a_grid_in_the_same_file_are_not_opened(world, half):
    grid = [{"name": "eclipse", "purify.denoiser": "/nowhere"}]
    assert list(opened(world, half, matrix__defenses=grid).facts.denoisers) == [half]


def test_trials_find_what_was_named_by_relative_paths(world, half, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(half).parent)
    settings = settings_for(world, Path("out"), "denoiser")
    config = open_sweep(load_config(None, settings)).config
    assert (config.data.output, config.purify.denoiser) == (str(Path(half).parent / "out"), half)


def test_the_plan_lists_and_times_the_trials(swept):
    plan = swept.plan
    assert (plan.trials, plan.done, plan.purifications, plan.denoisers, plan.unknown) == (4, 0, 2, 0, [])
    assert plan.missing[0] == "t_star 2, sigma 0.0"
    assert plan.seconds_left > 0


def test_every_trial_is_measured_and_the_best_is_named(swept):
    rows = pq.read_table(swept.output / "results.parquet").to_pylist()
    assert {(row["t_star"], row["sigma"]) for row in rows} == {(2, 0.0), (2, 0.05), (4, 0.0), (4, 0.05)}
    for row in rows:
        assert 0 <= row["proxy_accuracy"] <= 100
        assert 10 < row["psnr"] < 100
        assert row["score"] == pytest.approx(row["proxy_accuracy"] + 0.1 * row["psnr"])
        assert (row["images"], row["scored_images"], row["sparse"], row["epochs"]) == (40, 10, 10, 2)
        assert not row["stopped"]
    assert any(row["pareto"] for row in rows)
    best = max(rows, key=lambda row: row["score"])
    assert (swept.result.trials, swept.result.failed) == (4, 0)
    assert swept.result.best["purify"]["t_star"] == best["t_star"]
    assert swept.result.best["compensation"]["sigma"] == best["sigma"]
    assert swept.result.score == pytest.approx(best["score"], abs=1e-3)
    for picture in ("pareto.png", "heatmap.png"):
        assert (swept.output / picture).read_bytes().startswith(b"\x89PNG")


def test_trials_that_differ_in_compensation_share_the_purified_images(swept):
    # Two depths, each of a part of the dataset and of the clean images.
    assert len(list(swept.output.glob("cache/defended/*.npy"))) == 4
    psnr = {(row["t_star"], row["psnr"]) for row in pq.read_table(swept.output / "results.parquet").to_pylist()}
    assert len(psnr) == 2


def test_running_again_does_nothing(swept):
    before = kept_by_experiment(swept.output)
    assert verbs.sweep(settings=swept.settings).best == swept.result.best
    assert kept_by_experiment(swept.output) == before
    assert verbs.sweep_plan(settings=swept.settings).missing == []


@pytest.mark.chaos
def test_purify_takes_the_best_settings(swept, world, half, tmp_path):
    output = tmp_path / "purified"
    result = verbs.purify(world.poisoned, str(output), config=str(swept.output / "best.yaml"))
    assert (result.planned, result.ok) == (240, 240)
    used = load_config(str(output / "_eclipse/config.yaml"))
    for section, keys in swept.result.best.items():
        assert {key: getattr(getattr(used, section), key) for key in keys} == keys
    assert (used.purify.denoiser, used.data.source) == (half, world.poisoned)


def test_without_a_denoiser_a_part_of_the_clean_set_trains_and_the_rest_scores(world):
    sets = sets_of(world, sweep__space={"sweep.sparse_percent": [2.5, 4.0]})
    assert {percent: len(part.ids) for percent, part in sets.parts.items()} == {None: 10, 2.5: 6, 4.0: 10}
    for part in sets.parts.values():
        assert set(part.hashes()).isdisjoint(sets.test.hashes())
    with pytest.raises(InputError, match="may train a denoiser"):
        sets_of(world, sweep__sparse_percent=8)


def test_a_clean_set_that_all_trained_the_denoiser_cannot_score_a_victim(world, tmp_path):
    settings = settings_for(world, tmp_path / "out", world.denoiser)
    with pytest.raises(InputError, match=r"all 20 images trained .*eclipse-ray split .* --clean 10"):
        verbs.sweep(settings=settings)
    assert not (tmp_path / "out").exists()


def test_images_that_score_trained_no_denoiser_whatever_their_size_in_memory(world, half):
    sets = sets_of(world, half, data__resize=24)
    assert sets.test.images.shape == (10, 24, 24, 3)
    assert set(read_card(half).sparse_hashes).isdisjoint(sets.test.hashes())


def test_a_trial_sees_neither_test_images_nor_their_labels(world, half, tmp_path):
    assert opened(world, half, data__test=str(tmp_path / "missing")).trials_left() == 4


def test_baked_compensation_is_written_into_the_images_that_train(world, half, tmp_path, monkeypatch):
    seen = []

    def train(images, labels, test_images, test_labels, victim, compensation, *rest, **others):
        seen.append((np.array(images), compensation.mode))
        rest[-1](victim.epochs, 50.0, 0.0)

    monkeypatch.setattr(run, "train_victim", train)
    space = {"compensation.mode": ["none", "augment", "baked"]}
    sweep = opened(world, half, sweep__space=space, data__output=str(tmp_path / "out"))
    for trial in sweep.trials:
        assert measured_here(sweep, trial).test_accuracy == [50.0]
    assert [mode for _, mode in seen] == ["none", "augment", "none"]
    plain, augmented, baked = (images for images, _ in seen)
    assert np.array_equal(plain, augmented)
    assert not np.array_equal(plain, baked)


def test_a_sample_is_of_all_classes_and_does_not_change(world):
    sets = [sets_of(world, sweep__images=count) for count in (40, 40, 20)]
    assert sets[0].source.ids == sets[1].source.ids
    assert set(sets[2].source.ids) < set(sets[0].source.ids)
    whole = load_images(world.poisoned, load_config().data)
    assert set(sets[2].source.labels) == set(whole.labels)
    place = whole.ids.index(sets[0].source.ids[3])
    assert np.array_equal(sets[0].source.images[3], whole.images[place])


def test_clean_images_of_classes_that_the_sample_lacks_score_nothing(world):
    sets = sets_of(world)
    part = np.isin(sets.source.labels, [2, 5])
    source = replace(sets.source, images=sets.source.images[part], labels=sets.source.labels[part])
    scored = replace(sets.test, labels=np.where(np.arange(len(sets.test.ids)) == 0, -1, sets.test.labels))
    kept = of_classes(scored, source)
    assert set(kept.labels) <= {-1, 2, 5}
    assert len(kept.ids) == np.isin(scored.labels, [-1, 2, 5]).sum() > 1
    note = "the sample has images of 2 of 10 classes"
    assert note in " ".join(sweep_notes(load_config(), replace(sets, source=source)))


def test_a_poisoned_set_that_holds_clean_images_is_refused(world):
    with pytest.raises(InputError, match="sparse clean set and training set share 20"):
        sets_of(world, data__source=world.clean)
    with pytest.raises(ConfigError, match="--out DIR"):
        sweep_sets(load_config(None, {**SETTINGS, "data.source": world.rest}))


def test_a_stopped_trial_is_the_best_only_if_there_is_no_other(swept):
    sweep = open_sweep(load_config(None, swept.settings))
    first, *others = sweep.measured_trials()
    for trial in others:
        key = trial.recipes[0].key
        sweep.results[key] = replace(sweep.result(key), stopped=True, test_accuracy=[100.0])
    assert tidy.best_trial(sweep) == first
    key = first.recipes[0].key
    sweep.results[key] = replace(sweep.result(key), stopped=True)
    assert tidy.best_trial(sweep) in others


def test_the_best_settings_are_the_same_when_every_setting_was_written_out(swept):
    short = load_config(None, swept.settings)
    full = Config.model_validate(short.model_dump(mode="json"))
    assert tidy.sweep_view(open_sweep(full)).best == tidy.sweep_view(open_sweep(short)).best


def test_more_victims_of_a_trial_keep_those_that_are_measured(swept):
    more = open_sweep(load_config(None, {**swept.settings, "sweep.seeds": 2}))
    assert more.measured_trials() == []
    assert len(more.missing()) == len(more.grid.recipes) / 2 == 4


@pytest.mark.chaos
def test_a_failing_point_does_not_hold_up_the_others(world, half, tmp_path):
    settings = settings_for(world, tmp_path / "out", half, sweep__space={"purify.t_star": [2, 4]})
    sweep = open_sweep(load_config(None, settings))
    # The cache says that the images of depth 2 are there, but they are not.
    sweep.cache.finish("defended", sweep.trials[0].recipes[0].training, {"psnr": None})
    result = verbs.sweep(settings=settings)
    assert (result.trials, result.failed) == (1, 1)
    assert list(result.failures) == ["t_star 2"]
    assert result.best["purify"]["t_star"] == 4


@pytest.mark.chaos
def test_optuna_learns_from_results_and_goes_on(world, half, tmp_path):
    space = {"purify.t_star": [2, 3, 4], "compensation.p": {"low": 0.0, "high": 1.0}}
    settings = settings_for(world, tmp_path / "out", half, sweep__space=space, sweep__search="optuna")
    first = verbs.sweep(settings={**settings, "sweep.trials": 2})
    assert first.trials == 2
    kept = kept_by_experiment(tmp_path / "out")
    second = verbs.sweep(settings={**settings, "sweep.trials": 4})
    assert second.trials == 4
    assert kept_by_experiment(tmp_path / "out").items() >= kept.items()
    assert second.score >= first.score


@pytest.mark.chaos
def test_asha_stops_victims_and_keeps_what_they_reached(world, half, tmp_path):
    space = {"compensation.p": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}
    asha = {"sweep__asha": True, "sweep__grace_epochs": 1, "sweep__reduction_factor": 2, "victim__epochs": 4}
    result = verbs.sweep(settings=settings_for(world, tmp_path / "out", half, sweep__space=space, **asha))
    assert (result.trials, result.failed) == (6, 0)
    rows = pq.read_table(tmp_path / "out/results.parquet").to_pylist()
    assert {row["epochs"] for row in rows if not row["stopped"]} == {4}
    assert all(row["epochs"] < 4 for row in rows if row["stopped"])
    assert any(not row["stopped"] for row in rows)


@pytest.mark.chaos
def test_denoisers_are_trained_on_parts_of_the_clean_set(world, tmp_path):
    space = {"denoiser.replication": [0, 2], "sweep.sparse_percent": [2.5]}
    settings = settings_for(world, tmp_path / "out", None, sweep__space=space, denoiser__iterations=20)
    assert verbs.sweep_plan(settings=settings).denoisers == 2
    result = verbs.sweep(settings=settings)
    assert (result.trials, result.failed) == (2, 0)
    best = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
    card = read_card(best["purify"]["denoiser"])
    sets = sweep_sets(load_config(None, settings))
    assert card.sparse_images == 6
    assert set(card.sparse_hashes).isdisjoint(sets.test.hashes())


# Two drivers and as many clusters.
@pytest.mark.timeout(900)
@pytest.mark.chaos
def test_a_driver_killed_on_the_way_goes_on_with_what_is_missing(world, half, tmp_path):
    output = tmp_path / "out"
    space = {"purify.t_star": [2, 4], "compensation.p": [0.0, 0.3, 0.6]}
    settings = settings_for(world, output, half, sweep__space=space, sweep__max_concurrent=1, victim__epochs=6)
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = kill_and_go_on(["sweep", *assignments], output, 2, 6)
    assert (result["trials"], result["failed"]) == (6, 0)
    assert set(result["best"]["purify"]) >= {"t_star", "num_inference_steps"}
    assert set(result["best"]["compensation"]) >= {"p", "sigma"}
