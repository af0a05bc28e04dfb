"""Fronts by hand."""

from eclipse_ray.experiments.rows import pareto_front


def test_the_front_is_what_no_other_point_beats():
    assert pareto_front([1, 2, 3, 2], [9, 8, 1, 7]) == [True, True, True, False]
    assert pareto_front([1, 1], [2, 2]) == [True, True]
    assert pareto_front([], []) == []
