"""The space of a sweep: its points, their keys, what cannot be searched; the front of its results."""

import pytest

from eclipse_ray.config import Config, load_config
from eclipse_ray.diffusion.process import cosine_alphas_cumprod
from eclipse_ray.errors import ConfigError
from eclipse_ray.experiments.recipe import Facts, Recommended
from eclipse_ray.experiments.rows import pareto_front
from eclipse_ray.experiments.search import (
    choose_trials,
    deepest_points,
    default_space,
    make_trial,
    space_of,
    training_points,
)
from tests.support import dotted

CARD = Recommended(
    125, 100, 1, "ddpm", tile=512, int8=True, alphas_cumprod=cosine_alphas_cumprod(4000), weights="weights"
)
GIVEN = Facts("source", "scored", {}, {"folder": CARD})
TRAINED = Facts("source", "scored", {None: "all", 2.0: "two", 4.0: "four"})


def config_for(space: dict[str, object], given: bool = True, **settings: object) -> Config:
    own = {f"sweep.{key}": value for key, value in settings.items() if "__" not in key}
    other = dotted({key: value for key, value in settings.items() if "__" in key})
    return load_config(
        None, {"sweep.space": space, "purify.denoiser": "folder" if given else None, **own, **other}
    )


def trials(space: dict[str, object], **settings: object):
    config = config_for(space, **settings)
    return choose_trials(config, space_of(config, GIVEN), GIVEN)


def keys(space: dict[str, object], **settings: object) -> list[str]:
    """Return the key of the first victim of each trial."""
    return [trial.recipes[0].key for trial in trials(space, **settings)]


def test_a_grid_has_every_point_once():
    found = trials({"purify.t_star": [50, 100], "compensation.p": {"low": 0.2, "high": 0.6, "step": 0.2}})
    assert [tuple(trial.point.values()) for trial in found] == [
        (depth, p) for depth in (50, 100) for p in (0.2, 0.4, 0.6)
    ]
    assert len({trial.recipes[0].key for trial in found}) == 6
    assert len({trial.recipes[0].training for trial in found}) == 2
    assert found[0].title == "t_star 50, p 0.2"


def test_trials_that_share_a_purification_are_neighbours():
    found = trials({"compensation.p": [0.2, 0.4], "purify.t_star": [50, 100]})
    assert [trial.row.config.purify.t_star for trial in found] == [50, 50, 100, 100]


def test_points_that_come_to_the_same_are_tried_once():
    # Without compensation p does not matter, and with one step no sampler does.
    assert len(trials({"compensation.mode": ["none"], "compensation.p": [0.2, 0.4]})) == 1
    assert len(trials({"purify.num_inference_steps": [1], "purify.sampler": ["ddpm", "ddim"]})) == 1
    assert len(trials({"purify.num_inference_steps": [2], "purify.sampler": ["ddpm", "ddim"]})) == 2


def test_a_recommended_value_and_the_same_value_are_one():
    assert keys({"purify.t_star": [100]}) == keys({"purify.num_inference_steps": [1]})


def test_what_is_no_part_of_a_result_is_no_part_of_its_key():
    space = {"purify.t_star": [50]}
    (key,) = keys(space)
    assert keys(space, search="random") == keys(space, max_concurrent=1, fidelity_weight=3) == [key]
    first, second = trials(space, seeds=2)[0].recipes
    assert first.key == key != second.key
    assert key not in (*keys(space, victim__epochs=3), *keys(space, asha=True))


def test_more_steps_than_timesteps_are_left_out():
    found = trials({"purify.t_star": [2, 100], "purify.num_inference_steps": [1, 4]})
    assert [tuple(trial.point.values()) for trial in found] == [(2, 1), (100, 1), (100, 4)]


def test_trials_bound_a_grid_and_a_random_search():
    grid = {"compensation.p": [0.1, 0.2, 0.3, 0.4], "compensation.sigma": [0.01, 0.02, 0.03]}
    some = keys(grid, trials=5)
    assert len(set(some)) == 5
    assert some == keys(grid, trials=5)
    ranges = {
        "compensation.p": {"low": 0.2, "high": 0.6},
        "compensation.sigma": {"low": 0.01, "high": 1, "log": True},
    }
    drawn = [trial.row.config.compensation for trial in trials(ranges, search="random", trials=20)]
    assert len(drawn) == 20
    assert all(0.2 <= one.p <= 0.6 and 0.01 <= one.sigma <= 1 for one in drawn)
    # Half of a logarithmic range lies below its geometric mean.
    assert 4 < sum(one.sigma < 0.1 for one in drawn) < 16
    depths = trials({"purify.t_star": {"low": 10, "high": 12}}, search="random", trials=9)
    assert sorted(trial.point["purify.t_star"] for trial in depths) == [10, 11, 12]


@pytest.mark.parametrize(
    ("space", "settings", "words"),
    [
        ({"victim.epochs": [1]}, {}, "no axis"),
        ({"purify.batch_size": [1]}, {}, "no axis"),
        ({"denoiser.replication": [0, 4]}, {}, "leave --denoiser out"),
        ({"denoiser.iterations": {"low": 1, "high": 9}}, {"given": False}, "trains a denoiser"),
        ({"compensation.p": {"low": 0, "high": 1}}, {}, "a grid needs the values"),
        ({"compensation.p": [3]}, {}, "compensation.p"),
        ({"compensation.p": [True]}, {}, "compensation.p: expected a number, found True"),
        ({"sweep.sparse_percent": ["a"]}, {"given": False}, "sweep.sparse_percent: expected a number, found 'a'"),
        ({"sweep.sparse_percent": {"low": 1, "high": 9}}, {"given": False}, "needs listed values or a step"),
        ({"compensation.p": []}, {}, "no value"),
        ({"compensation.p": {"low": 1, "high": 0}}, {}, "must lie below"),
        ({"compensation.p": {"low": 0, "high": float("inf"), "step": 1}}, {}, "high: expected a finite number"),
        ({"compensation.p": {"low": float("nan"), "high": 1, "step": 1}}, {}, "low: expected a finite number"),
        ({"compensation.p": {"low": 0, "high": 1, "step": 1e-9}}, {}, "more than 10,000 values; raise it"),
        ({}, {"asha": True, "seeds": 2}, "asha"),
        ({"purify.t_star": [2], "purify.num_inference_steps": [4]}, {}, "every point"),
        ({"purify.t_star": [50, 150]}, {}, r"t_star 150 is outside 1\.\.125"),
    ],
)
def test_what_cannot_be_searched_is_refused(space, settings, words):
    with pytest.raises(ConfigError, match=words):
        trials(space, **settings)


def test_denoisers_are_keyed_by_what_trains_them():
    space = {"denoiser.replication": [0, 4], "sweep.sparse_percent": [2.0, 4.0], "purify.t_star": [50, 100]}
    config = config_for(space, given=False)
    found = choose_trials(config, space_of(config, TRAINED), TRAINED)
    assert len(found) == 8
    assert len({trial.row.denoiser for trial in found}) == 4
    assert training_points(space_of(config, TRAINED)) == [
        {"denoiser.replication": copies, "sweep.sparse_percent": percent}
        for copies in (0, 4)
        for percent in (2.0, 4.0)
    ]
    assert deepest_points(space_of(config, TRAINED))[0]["purify.t_star"] == 100
    # Null is what the denoiser recommends.
    some = {"purify.t_star": [None, 50], "purify.num_inference_steps": [None]}
    assert deepest_points(some) == [{"purify.t_star": 50, "purify.num_inference_steps": None}]


def test_a_preset_is_an_axis_with_all_its_values():
    space = {"denoiser.preset": ["debug", "small"]}
    config = config_for(space, given=False, denoiser__batch_size=8)
    debug, small = (
        make_trial(config, {"denoiser.preset": name}, TRAINED).row.config.denoiser
        for name in space["denoiser.preset"]
    )
    assert (debug.image_size, debug.num_train_timesteps, debug.batch_size) == (16, 20, 8)
    assert (small.image_size, small.num_train_timesteps, small.batch_size) == (32, 4000, 8)
    back = make_trial(
        config_for(space, given=False, denoiser__preset="debug"), {"denoiser.preset": "small"}, TRAINED
    )
    assert back.row.config.denoiser == load_config().denoiser


def test_the_default_space_suits_the_denoiser():
    config = config_for({})
    axes = default_space(config, GIVEN)
    assert max(axes["purify.t_star"]) <= CARD.t_max
    assert len(choose_trials(config, axes, GIVEN)) == config.sweep.trials


def test_the_front_is_what_no_other_point_beats():
    assert pareto_front([1, 2, 3, 2], [9, 8, 1, 7]) == [True, True, True, False]
    assert pareto_front([1, 1], [2, 2]) == [True, True]
    assert pareto_front([], []) == []
