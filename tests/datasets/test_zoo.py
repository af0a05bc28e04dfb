"""Every unusual image has one documented outcome and one row in a run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import ImageError, decode_image, decode_stored
from eclipse_ray.ledger import plan_shards
from eclipse_ray.purification.stages import Task, read_and_decode, task_rows, unpack
from tests.support import job_of
from tests.zoo import NOISE, bombs, saved, specimens

CONFIG = DataConfig()
ZOO = specimens()
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
PALETTE = "palette with a transparent entry, "
TRANSPARENT = [f"{PALETTE}PNG", f"{PALETTE}GIF", "RGBA PNG", "gray with alpha PNG", "RGBA WebP"]
APNG = "animated PNG with a picture of its own"
ANIMATED = ["animated GIF", "animated PNG", APNG, "animated WebP", "TIFF of several pages"]


@pytest.mark.parametrize("name", ZOO)
def test_every_specimen_has_its_documented_outcome(name):
    specimen = ZOO[name]
    if specimen.pixels is None:
        with pytest.raises(ImageError, match=specimen.reason):
            decode_stored(specimen.data, CONFIG)
    else:
        decoded = decode_stored(specimen.data, CONFIG)
        assert decoded.dtype == np.uint8
        assert decoded.shape == specimen.pixels.shape
        # Only a JPEG may differ by one.
        assert np.abs(decoded.astype(int) - specimen.pixels).max() <= ("CMYK JPEG" in name)


def test_the_table_of_outcomes_is_complete():
    rows = {line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")}
    assert set(ZOO) <= rows


@pytest.mark.parametrize("name", ZOO)
def test_policies_refuse_what_they_say_and_nothing_else(name):
    for policy, refused in ((DataConfig(alpha="refuse"), TRANSPARENT), (DataConfig(animated="refuse"), ANIMATED)):
        if name in refused:
            with pytest.raises(ImageError, match="does not permit"):
                decode_stored(ZOO[name].data, policy)
        elif ZOO[name].pixels is None:
            with pytest.raises(ImageError, match=ZOO[name].reason):
                decode_stored(ZOO[name].data, policy)
        else:
            assert np.array_equal(decode_stored(ZOO[name].data, policy), decode_stored(ZOO[name].data, CONFIG))


def test_truncated_images_are_never_filled_with_grey():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        whole = saved(Image.fromarray(NOISE), format)
        for share in (0.3, 0.6, 0.9):
            with pytest.raises(ImageError, match=r"damaged|known format"):
                decode_image(whole[: int(len(whole) * share)], CONFIG.max_pixels)


@pytest.fixture
def zoo_folder(tmp_path):
    for number, specimen in enumerate(ZOO.values()):
        (tmp_path / f"{number:03d}.jpg").write_bytes(specimen.data)
    return str(tmp_path)


def test_every_specimen_becomes_an_image_or_an_error_row(zoo_folder):
    source = open_source(zoo_folder, CONFIG)
    shards = plan_shards(source.parts, 16)
    ok, failed = [], []
    for batch in task_rows([Task(shard) for shard in shards]):
        row = read_and_decode(batch, job_of(source))
        assert row["fatal"][0].as_py() == ""
        table, images, failures = unpack(row)
        assert len(images) == table.num_rows
        ok += table["id"].to_pylist()
        failed += [failure["id"] for failure in failures]
        assert all(failure["error"] for failure in failures)
    expected = [f"{number:03d}.jpg" for number, each in enumerate(ZOO.values()) if each.pixels is None]
    assert failed == expected
    assert sorted(ok + failed) == [f"{number:03d}.jpg" for number in range(len(ZOO))]


def test_a_run_can_stop_at_the_first_bad_image(zoo_folder):
    source = open_source(zoo_folder, CONFIG)
    (batch,) = task_rows([Task(shard) for shard in plan_shards(source.parts, 1000)])
    row = read_and_decode(batch, job_of(replace(source, data=DataConfig(on_error="stop"))))
    fatal = row["fatal"][0].as_py()
    assert "016.jpg: the image has 16-bit channels in separate planes" in fatal
    assert "data.on_error=row" in fatal


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    for number, specimen in enumerate(bombs().values()):
        (tmp_path / str(number)).write_bytes(specimen.data)
    script = """
import json, resource, sys
from pathlib import Path
from eclipse_ray.datasets.images import ImageError, decode_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, refused = peak(), 0
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode_image(file.read_bytes(), 40_000_000)
    except ImageError:
        refused += 1
print(json.dumps([refused, peak() - before]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    refused, grown = json.loads(done.stdout)
    assert refused == len(bombs())
    assert grown <= 200, f"refusing bombs took {grown} MB"
