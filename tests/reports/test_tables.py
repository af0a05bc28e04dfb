"""Tables of a matrix from tidy rows: layout, spread, averages, unfinished cells; and the paper's numbers.

What can be checked of these is that the paper's rows add up to its own averages.
"""

import csv
import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from eclipse_ray.defenses import DEFENSES
from eclipse_ray.errors import InputError
from eclipse_ray.reports.tables import (
    CLEAN,
    CLEAN_ACCURACY,
    SAME_ROW,
    TABLES,
    TIDY,
    published,
    read_view,
    spread,
    tables_of,
    write_tables,
)
from eclipse_ray.reports.tables import to_markdown as written
from eclipse_ray.results import MatrixAxis, MatrixView
from eclipse_ray.storage.store import Store

COLUMNS = [MatrixAxis("clean", "clean"), MatrixAxis("em", "em", "L-inf 8/255"), MatrixAxis("ar", "ar", "L2 1.000")]
ROWS = [MatrixAxis("none", "none"), MatrixAxis("eclipse", "eclipse"), MatrixAxis("mine", "")]


def tidy(defense: str, poison: str, seed: int, accuracy: float) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(TIDY.names)
    row |= {"poison": poison, "defense": defense, "victim": "small", "recipe": "quick", "epochs": 2, "seed": seed}
    row |= {"n": 100, "sparse": 4, "b_over_n": 4.0, "test_images": 50, "test_accuracy": accuracy}
    row |= {"best_epoch_accuracy": accuracy + 1, "best_epoch": 1, "seconds": 2.0, "device": "CPU"}
    return row


def view(rows: list[dict[str, object]], **changes: object) -> MatrixView:
    settings: dict[str, object] = {
        "columns": COLUMNS,
        "defenses": ROWS,
        "victims": [MatrixAxis("small", "small", "Victim small")],
        "seeds": [0, 1],
        "dataset": "cifar10",
        "images": 100,
        "sparse": 4,
        "test_images": 50,
        "rows": rows,
    }
    return MatrixView(**{**settings, **changes})  # type: ignore[arg-type]


FULL = [
    tidy(defense, poison, seed, base + 2 * seed)
    for defense, base in (("none", 20.0), ("eclipse", 60.0))
    for poison in ("em", "ar")
    for seed in (0, 1)
] + [tidy("none", "clean", seed, 75.0) for seed in (0, 1)]


def to_markdown(of: MatrixView) -> str:
    return written(tables_of(of))


def section(markdown: str, title: str) -> dict[str, list[str]]:
    """The cells of a table by row label; the head is under "defense"."""
    lines = markdown.split(f"### {title}")[1].split("###")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_mean_and_the_deviation_stand_beside_the_number_of_the_paper():
    table = section(to_markdown(view(FULL)), "Test accuracy")
    assert table["defense"] == ["em", "ar", "AVG"]
    assert table["none"] == ["21.0 ± 1.4 [17.58]", "21.0 ± 1.4 [10.59]", "21.0 ± 1.4 [14.08]"]
    assert table["eclipse"][2] == "61.0 ± 1.4 [85.06]"
    assert table["mine"] == ["·", "·", "·"]


def test_the_average_of_the_paper_is_over_the_columns_shown():
    columns = [COLUMNS[1], MatrixAxis("cuda", "cuda")]
    table = section(to_markdown(view(FULL, columns=columns)), "Test accuracy")
    assert table["none"] == ["21.0 ± 1.4 [17.58]", "·", "·"]


def test_the_average_varies_with_the_seed_not_with_the_column():
    rows = [row | {"test_accuracy": 10.0 if row["poison"] == "em" else 90.0} for row in FULL]
    assert section(to_markdown(view(rows)), "Test accuracy")["none"][2].startswith("50.0 ± 0.0")


def test_unfinished_cells_are_marked_and_counted():
    markdown = to_markdown(view(FULL[:3]))
    table = section(markdown, "Test accuracy")
    assert table["none"] == ["21.0 ± 1.4 [17.58]", "20.0 (n = 1) [10.59]", "· [14.08]"]
    assert "15 of 18 are left" in markdown
    assert "none yet" not in markdown


def test_a_table_without_any_result_is_all_unfinished():
    markdown = to_markdown(view([]))
    assert "18 of 18 are left" in markdown
    assert section(markdown, "Clean accuracy")["eclipse"] == ["· [90.43]", "·"]
    assert "none yet" in markdown


def test_gaps_are_to_undefended_clean():
    markdown = to_markdown(view(FULL))
    assert section(markdown, "Gap to undefended clean (75.0)")["eclipse"] == ["14.0", "14.0", "14.0"]
    assert section(markdown, "Clean accuracy")["none"] == ["75.0 ± 0.0 [94.95]", "0.0"]


def test_more_sparse_images_than_the_threat_model_allows_are_warned_of():
    assert "Warning" not in to_markdown(view(FULL))
    assert "B/N = 20.0 %" in to_markdown(view(FULL, sparse=20))
    assert "Warning" in to_markdown(view(FULL, sparse=20))


def test_costs_are_means_and_a_dash_where_nothing_is_transformed():
    rows = [row | ({"defense_seconds": 4.0, "psnr": 30.0} if row["defense"] == "eclipse" else {}) for row in FULL]
    table = section(to_markdown(view(rows)), "Cost")
    assert table["eclipse"][0] == "4"
    assert table["eclipse"][2] == "30.0"
    assert table["none"][0] == "-"
    assert table["mine"][0] == "·"


def test_parquet_and_csv_hold_one_row_a_victim(tmp_path):
    write_tables(str(tmp_path), view(FULL))
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.schema.names == TIDY.names
    assert table.num_rows == len(FULL)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [float(row["test_accuracy"]) for row in rows] == table["test_accuracy"].to_pylist()
    assert "### Test accuracy" in (tmp_path / "table.md").read_text()


def test_the_page_has_the_tables_of_the_markdown_from_the_same_rows(tmp_path):
    unfinished = view(FULL[:3])
    markdown = write_tables(str(tmp_path), unfinished)
    assert read_view(Store(str(tmp_path))) == unfinished
    (tmp_path / "table.md").write_text("not read")
    assert written(tables_of(read_view(Store(str(tmp_path))))) == markdown


@pytest.mark.parametrize(
    "change", [lambda table: table.replace_schema_metadata(None), lambda table: table.drop_columns(["rho"])]
)
def test_rows_of_another_version_are_refused(tmp_path, change):
    write_tables(str(tmp_path), view(FULL))
    path = tmp_path / "results.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(InputError, match=r"results\.parquet: not written by this version; run its command again"):
        read_view(Store(str(tmp_path)))


def test_a_poison_with_reduced_numbers_is_called_so_in_every_table():
    rows = [row | {"cost": "reduced" if row["poison"] == "em" else ""} for row in FULL]
    markdown = to_markdown(view(rows))
    assert section(markdown, "Test accuracy")["defense"] == ["em (reduced)", "ar", "AVG"]
    assert section(markdown, "Gap to undefended clean")["defense"] == ["em (reduced)", "ar", "AVG"]
    assert "Budgets: em (reduced): L-inf 8/255" in markdown
    full = [row | {"cost": "full"} for row in FULL]
    assert "reduced" not in to_markdown(replace(view(rows), rows=full))


@pytest.mark.parametrize(("values", "text"), [([], "·"), ([50.0], "50.0"), ([49.0, 51.0], "50.0 ± 1.4")])
def test_spread_is_the_deviation_of_a_sample(values, text):
    assert spread(values) == text


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
