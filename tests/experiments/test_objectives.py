"""Objectives of a sweep against planted shortcuts, ranks by hand, and fronts by hand."""

import pytest
import torch

from eclipse_ray.errors import InputError
from eclipse_ray.experiments.objectives import pareto_front, shortcut_score, spearman

CLASSES = 4


def residuals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 8, 8, 3, generator=generator)
    return noise, torch.arange(count) % CLASSES


def test_a_constant_pattern_of_each_class_is_found():
    noise, labels = residuals(120, 0)
    pattern = torch.randn(CLASSES, 8, 8, 3, generator=torch.Generator().manual_seed(9))
    score = shortcut_score(noise + pattern[labels], labels, residuals(60, 1)[0], seed=0)
    assert score.removed_accuracy > 95
    assert score.score == pytest.approx(score.removed_accuracy - score.clean_confidence)
    assert score.score > 30


def test_a_texture_of_each_class_without_a_constant_pattern_is_found():
    # As an autoregressive poison: each class correlates other neighbours, each image with a draw of its own.
    noise, labels = residuals(240, 0)
    shifts = [(1, 0), (0, 1), (1, 1), (2, 0)]
    textured = torch.stack(
        [one + one.roll(shifts[label], dims=(0, 1)) for one, label in zip(noise, labels, strict=True)]
    )
    score = shortcut_score(textured, labels, residuals(60, 1)[0], seed=0)
    assert score.removed_accuracy > 80
    assert score.score > 15


def test_without_a_shortcut_the_score_is_near_zero():
    noise, labels = residuals(200, 0)
    score = shortcut_score(noise, labels, residuals(100, 1)[0], seed=0)
    assert abs(score.score) < 15


def test_the_score_depends_on_its_seed_alone():
    noise, labels = residuals(60, 0)
    clean = residuals(30, 1)[0]
    assert shortcut_score(noise, labels, clean, seed=3) == shortcut_score(noise, labels, clean, seed=3)


@pytest.mark.parametrize(("count", "clean", "side"), [(8, 10, 8), (40, 0, 8), (40, 10, 6)])
def test_what_cannot_be_scored_is_refused(count, clean, side):
    noise, labels = residuals(count, 0)
    with pytest.raises(InputError, match="shortcut_score"):
        shortcut_score(noise, labels, residuals(clean, 1)[0][:, :side], seed=0)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 100]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # Equal values share rank 1.5: covariance of (0, 1, 2) with (0.5, 0.5, 2) over their deviations.
    assert spearman([1, 2, 3], [5, 5, 9]) == pytest.approx(1.5 / (2 * 1.5) ** 0.5)
    assert spearman([1, 2, 3], [7, 7, 7]) is None
    with pytest.raises(InputError, match="partner"):
        spearman([1, 2], [1])


def test_the_front_is_what_no_other_point_beats():
    assert pareto_front([1, 2, 3, 2], [9, 8, 1, 7]) == [True, True, True, False]
    assert pareto_front([1, 1], [2, 2]) == [True, True]
    assert pareto_front([], []) == []
