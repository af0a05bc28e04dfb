"""Files and pictures of a sweep from rows made by hand."""

import io

import matplotlib.image
import pyarrow.parquet as pq
import pytest
import yaml

from eclipse_ray.reports.sweep import heat_map, pareto_chart, write_sweep
from eclipse_ray.results import SweepView


def row(t_star: int, sigma: float, accuracy: float, **changes: object) -> dict[str, object]:
    return {
        "t_star": t_star,
        "sigma": sigma,
        "proxy_accuracy": accuracy,
        "psnr": 40 - t_star / 50,
        "score": accuracy,
        "pareto": accuracy > 50,
        "stopped": False,
        **changes,
    }


ROWS = [row(depth, sigma, 40 + depth / 10 + 100 * sigma) for depth in (50, 100) for sigma in (0.0, 0.05, 0.1)]
BEST = {"purify": {"t_star": 100}, "compensation": {"sigma": 0.1}}


def view(rows: list[dict[str, object]], axes: list[str]) -> SweepView:
    return SweepView(axes, rows, BEST if rows else {}, "6 of 6 trials")


@pytest.mark.parametrize(
    ("rows", "axes"),
    [
        (ROWS, ["sigma", "t_star"]),
        (ROWS[:3], ["sigma"]),
        (ROWS[:1], []),
        ([*ROWS[:5], row(100, 0.2, 10, stopped=True)], ["t_star", "sigma"]),
    ],
)
def test_pictures_are_drawn_whatever_varies(rows, axes):
    for draw in (pareto_chart, heat_map):
        pixels = matplotlib.image.imread(io.BytesIO(draw(view(rows, axes)).png), format="png")
        assert min(pixels.shape[:2]) > 100
        assert pixels[..., :3].std() > 0.01


def test_files_can_be_read_back(tmp_path):
    write_sweep(str(tmp_path), view(ROWS, ["t_star", "sigma"]))
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.num_rows == 6
    assert table["sigma"].to_pylist() == [row["sigma"] for row in ROWS]
    text = (tmp_path / "best.yaml").read_text()
    assert text.startswith("# eclipse-ray purify SRC DST --config best.yaml")
    assert yaml.safe_load(text) == BEST


def test_a_sweep_without_a_result_has_an_empty_table_only(tmp_path):
    write_sweep(str(tmp_path), view([], []))
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0
    assert [file.name for file in tmp_path.iterdir()] == ["results.parquet"]
