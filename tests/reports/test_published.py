"""The paper's numbers: what can be checked of them is that its rows add up to its own averages."""

import pytest

from eclipse_ray.defenses import DEFENSES
from eclipse_ray.reports.tables import CLEAN, CLEAN_ACCURACY, SAME_ROW, TABLES, published

PRINTED = {
    (dataset, victim, name): row
    for dataset, victims in (*TABLES.items(), ("cifar10", {"clean": CLEAN_ACCURACY}))
    for victim, rows in victims.items()
    for name, row in rows.items()
}


@pytest.mark.parametrize("place", PRINTED)
def test_every_row_has_the_average_that_the_paper_prints(place):
    *values, average = sorted(PRINTED[place].items(), key=lambda cell: cell[0] == "avg")
    half_a_digit = 0.05 if place[0] == "imagenet" else 0.005
    mean = sum(value for _, value in values) / len(values)
    assert average == ("avg", pytest.approx(mean, abs=half_a_digit + 1e-9))


def test_a_cell_finds_its_number_and_others_find_none():
    assert published("cifar10", "resnet18", "eclipse", "em") == 82.80
    assert published("cifar10", "resnet18", "eclipse-published", "adp") == 82.62
    assert published("cifar10", "small", "iss-j", "tap") == 80.77
    assert published("cifar10", "vgg19", "none", "lsp") == 21.80
    assert published("cifar10", "densenet121", "eclipse", CLEAN) == 89.35
    assert published("imagenet", "densenet121", "at", CLEAN) == 71.9
    assert published("cifar10", "resnet18", "t_star 150", "ar") == 84.37
    assert published("cifar10", "vgg19", "none", "sep") is None
    assert published("cifar10", "resnet18", "dilution", "em") is None
    assert published("cifar10", "resnet18", "avatar", "em") is None
    assert published(None, "resnet18", "eclipse", "em") is None


def test_rows_of_table_1_are_defenses_of_ours():
    main = [name for name, row in TABLES["cifar10"]["resnet18"].items() if "adp" in row]
    assert [name for name in main if name not in DEFENSES] == []
    assert set(SAME_ROW.values()) <= set(main)
    assert set(TABLES["cifar10"]["vgg19"]) == set(main)
