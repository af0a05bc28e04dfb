"""The main job on Ray: counts, bytes, order, resume, leakage and what it refuses."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eclipse_ray import verbs
from eclipse_ray.cluster.connect import open_denoiser
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.images import decode_image, encode_image
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.datasets.table import table_to_parquet
from eclipse_ray.diffusion import network
from eclipse_ray.diffusion.network import Denoiser
from eclipse_ray.errors import ConfigError, InputError, ResumeError, error_of_note
from eclipse_ray.ledger import read_statuses
from eclipse_ray.parameters import resolve
from eclipse_ray.purification import plan as prepare
from eclipse_ray.purification.stages import Purifier, same_size_batches, task_rows, unpack
from eclipse_ray.results import StatusResult
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import fill, noise, table_of
from tests.purification.test_faults import decode, first_shard
from tests.support import (
    DEBUG,
    World,
    dotted,
    object_names,
    pixels_of,
    read_output,
    train_denoiser,
    untrained_denoiser,
)

SHARDS = {**DEBUG, "purify.shard_images": 32, "purify.actors": 2}
DATA = DataConfig()


def purify(world: World, output, **settings):
    return verbs.purify(world.poisoned, str(output), denoiser=world.denoiser, settings={**SHARDS, **settings})


@pytest.fixture(scope="module")
def purified(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("purified") / "out"
    result = purify(world, output)
    return output, result


def test_every_image_arrives_once_with_its_label(world, purified):
    output, result = purified
    assert (result.planned, result.ok, result.failed) == (240, 240, 0)
    source, table = read_output(world.poisoned), read_output(output)
    assert table["id"].to_pylist() == source["id"].to_pylist()
    assert table["label"].to_pylist() == source["label"].to_pylist()
    changed = pixels_of(table).astype(int) - pixels_of(source).astype(int)
    assert 0.5 < np.abs(changed).mean() < 40
    assert verbs.verify(str(output)).ok
    assert verbs.status(str(output)) == StatusResult(240, 240, 0, 8, 8)


def test_order_within_a_shard_is_the_sources(world, purified):
    output, _ = purified
    ids = load_images(world.poisoned, DATA).ids
    for status in read_statuses(Store(str(output))).values():
        shard_ids = pq.read_table(output / status.object)["id"].to_pylist()
        first = ids.index(shard_ids[0])
        assert shard_ids == ids[first : first + len(shard_ids)]


def test_hugging_face_datasets_opens_the_output(purified):
    from datasets import load_dataset

    output, _ = purified
    loaded = load_dataset("parquet", data_files=f"{output}/data/*.parquet", split="train")
    assert loaded.num_rows == 240
    assert loaded[0]["image"].size == (16, 16)
    assert loaded.features["label"].names[0]


def test_one_actor_gives_the_same_bytes(world, purified, tmp_path):
    purify(world, tmp_path / "one", **{"purify.actors": 1})
    assert object_names(tmp_path / "one") == object_names(purified[0])


def test_running_again_does_nothing_and_says_the_same(world, purified):
    output, _ = purified
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = purify(world, output)
    assert (again.planned, again.ok, again.failed, again.images_per_second) == (240, 240, 0, 0.0)
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"purify.t_star": 2}, "purify.t_star: 4 -> 2"),
        ({"run.seed": 7}, "run.seed: 0 -> 7"),
        ({"purify.tile": 64}, "purify.tile: None -> 64"),
        ({"data.resize": 24}, "data.resize: None -> 24"),
        ({"compensation.mode": "baked"}, "compensation.mode: 'augment' -> 'baked'"),
    ],
)
def test_an_output_of_other_settings_is_refused_with_the_difference(world, purified, settings, line):
    with pytest.raises(ResumeError) as caught:
        purify(world, purified[0], **settings)
    assert line in str(caught.value)


def test_an_output_of_other_weights_is_refused(world, purified, tmp_path):
    train_denoiser(world.clean, str(tmp_path / "other"), iterations=2)
    with pytest.raises(ResumeError, match="weights"):
        verbs.purify(world.poisoned, str(purified[0]), denoiser=str(tmp_path / "other"), settings=SHARDS)


@pytest.mark.chaos
def test_baked_compensation_grays_some_images(world, tmp_path):
    purify(world, tmp_path / "baked", **{"compensation.mode": "baked", "compensation.sigma": 0.0})
    images = pixels_of(read_output(tmp_path / "baked"))
    gray = (images[..., 0] == images[..., 1]).all(axis=(1, 2)) & (images[..., 1] == images[..., 2]).all(
        axis=(1, 2)
    )
    # p = 0.4 of 240 images; four standard deviations are 30.
    assert abs(int(gray.sum()) - 96) < 31


def test_undecodable_images_become_error_rows(world, tmp_path):
    table = pq.read_table(next((world.root / "poisoned/data").glob("*.parquet"))).slice(0, 40)
    images = table["image"].to_pylist()
    images[3] = {"bytes": images[3]["bytes"][:50], "path": None}
    images[7] = {"bytes": b"<html>not found</html>", "path": None}
    images[9] = {"bytes": None, "path": None}
    # All that the second shard of 32 has.
    images[32:] = [{"bytes": b"", "path": None}] * 8
    broken = table.set_column(1, "image", pa.array(images, table.schema.field("image").type))
    broken = broken.append_column("source_url", pa.array([f"u{i}" for i in range(40)]))
    (tmp_path / "src").mkdir()
    pq.write_table(broken, tmp_path / "src/part.parquet")
    places = str(tmp_path / "src"), str(tmp_path / "out")
    result = verbs.purify(*places, denoiser=world.denoiser, settings=SHARDS)
    assert (result.planned, result.ok, result.failed) == (40, 29, 11)
    errors = pa.concat_tables(pq.read_table(f) for f in (tmp_path / "out/_eclipse/errors").glob("*.parquet"))
    assert sorted(errors["id"].to_pylist()) == sorted(
        table["id"].to_pylist()[i] for i in (3, 7, 9, *range(32, 40))
    )
    assert all(errors["error"].to_pylist())
    output = read_output(tmp_path / "out")
    urls = dict(zip(table["id"].to_pylist(), broken["source_url"].to_pylist(), strict=True))
    assert output["source_url"].to_pylist() == [urls[name] for name in output["id"].to_pylist()]
    assert verbs.verify(str(tmp_path / "out")).ok
    for retry_failed, left in ((False, 0), (True, 40)):
        plan = verbs.purify_plan(*places, denoiser=world.denoiser, settings=SHARDS, retry_failed=retry_failed)
        assert plan.images_left == left


def test_images_of_the_sparse_set_are_refused_before_anything_is_written(world, tmp_path):
    for verb in (verbs.purify, verbs.purify_plan):
        with pytest.raises(InputError, match="is in the sparse clean set"):
            verb(world.clean, str(tmp_path / "leak"), denoiser=world.denoiser, settings=SHARDS)
    assert not (tmp_path / "leak").exists()


def test_a_dry_run_refuses_the_outputs_that_a_run_refuses(world, purified, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    cases = [
        (purified[0], {"purify.num_inference_steps": 2}, ResumeError, "num_inference_steps: 1 -> 2"),
        (tmp_path / "foreign", {}, ResumeError, "did not write .notes.txt"),
        (tmp_path / "file", {}, InputError, "this is a file; choose a folder"),
        (tmp_path / "file/within", {}, InputError, "is a file, not a folder; choose another output"),
        (tmp_path / "link/within", {}, InputError, "/link: is a link to nowhere, where nothing is; make that"),
    ]
    (tmp_path / "link").symlink_to("nowhere")
    for output, own, error, words in cases:
        for verb in (verbs.purify, verbs.purify_plan)[: 1 if output.name == "within" else 2]:
            with pytest.raises(error, match=words):
                verb(world.poisoned, str(output), denoiser=world.denoiser, settings={**SHARDS, **own})
    assert sorted(file.name for file in (tmp_path / "foreign").iterdir()) == ["notes.txt"]


def test_batches_hold_fewer_of_the_larger_images():
    images = [np.zeros((side, 10, 3), np.uint8) for side in (10, 100, 10, 100, 10, 300)]
    assert same_size_batches(images, 2, 1000) == [[0, 2], [4], [1], [3], [5]]
    assert same_size_batches(images, 64, 2000) == [[0, 2, 4], [1, 3], [5]]


def samples_of(folder, **settings):
    config = resolve(None, dotted(settings), {})
    return prepare.read_samples(open_source(str(folder), config.data), config, 64)


def test_a_sample_that_kills_its_decoder_leaves_the_others(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for number in range(5):
        tail = b"KILLER" if number in (1, 4) else b""
        image = encode_image(np.zeros((20, 20 + number, 3), np.uint8), "png") + tail
        (tmp_path / f"a/{number}.png").write_bytes(image)
    genuine = prepare.decode_stored

    def decode(data, policy):
        return os._exit(9) if data.endswith(b"KILLER") else genuine(data, policy)

    monkeypatch.setattr(prepare, "decode_stored", decode)
    assert [sample.width for sample in samples_of(tmp_path)] == [20, 22, 23]


def test_samples_of_large_images_are_their_middles(world, tmp_path):
    (sample,) = samples_of(fill(tmp_path, "a/x.png", images=noise(1, 400, 90)))
    assert (sample.height, sample.width, sample.crop.shape) == (400, 90, (64, 64, 3))
    assert samples_of(tmp_path, data__resize=32)[0].height == 32


def test_leakage_is_found_whatever_the_size_worked_at(world, tmp_path):
    job, task = first_shard(world, tmp_path / "out", world.clean, data__resize=24)
    _, images, _ = unpack(decode(job, task))
    assert {image.shape for image in images} == {(24, 24, 3)}
    stored = load_images(world.clean, DATA).hashes()
    fatal = decode(replace(job, sparse_hashes=frozenset(stored)), task)["fatal"][0].as_py()
    assert "is in the sparse clean set" in fatal


def test_no_column_between_stages_is_a_python_object(world, tmp_path):
    job, task = first_shard(world, tmp_path / "out")
    decoded = decode(job, task)
    purified = Purifier(job)(decoded)
    for table in (*task_rows([task]), decoded, purified):
        assert isinstance(table, pa.Table)
        for field in table.schema:
            assert not isinstance(field.type, pa.BaseExtensionType), field
            assert pa.types.is_string(field.type) or pa.types.is_large_binary(field.type) or field.type == "double"
    assert json.loads(purified["failures"][0].as_py()) == []


def test_the_wrong_denoiser_is_noticed(world, tmp_path, capsys):
    from eclipse_ray.datasets.synthetic import write_synthetic
    from eclipse_ray.diffusion.checkpoint import load_denoiser

    write_synthetic(str(tmp_path / "src"), 8, 16, 3)
    images = load_images(str(tmp_path / "src"), DATA)
    denoiser = load_denoiser(world.denoiser)
    prepare.warn_if_unsuitable(denoiser, list(images.images), 15.0, denoiser.t_star)
    assert "warning" not in capsys.readouterr().err
    noise = np.random.default_rng(0).integers(0, 256, images.images.shape, dtype=np.uint8)
    prepare.warn_if_unsuitable(denoiser, list(noise), 30.0, denoiser.t_star)
    assert "was this denoiser trained on images of this kind?" in capsys.readouterr().err


def test_an_imported_denoiser_must_leave_no_more_than_the_noise(capsys):
    denoiser = untrained_denoiser()
    images = list(np.random.default_rng(0).integers(60, 200, (8, 16, 16, 3), dtype=np.uint8))
    with torch.no_grad():
        for parameter in denoiser.unet.parameters():
            parameter.zero_()
    prepare.warn_if_unsuitable(denoiser, images, None, denoiser.t_star)
    assert "warning" not in capsys.readouterr().err
    with torch.no_grad():
        denoiser.unet.conv_out.bias.fill_(5)
    prepare.warn_if_unsuitable(denoiser, images, None, denoiser.t_star)
    assert "warning" in capsys.readouterr().err


@pytest.mark.chaos
def test_images_of_several_sizes_are_purified_at_their_own(world, tmp_path):
    sizes = [(16, 17), (24, 16), (133, 150), (15, 16)]
    images = [noise(1, *sizes[index % 4], seed=index)[0] for index in range(12)]
    fill(tmp_path / "src/a", *(f"{index:02d}.png" for index in range(12)), images=images)
    result = verbs.purify(str(tmp_path / "src"), str(tmp_path / "out"), denoiser=world.denoiser, settings=SHARDS)
    # 15 pixels are too few: those three are error rows.
    assert (result.ok, result.failed) == (9, 3)
    errors = pa.concat_tables(pq.read_table(f) for f in (tmp_path / "out/_eclipse/errors").glob("*.parquet"))
    assert all("16x15 pixels; purification needs at least 16" in error for error in errors["error"].to_pylist())
    for row in read_output(tmp_path / "out").to_pylist():
        index = int(row["id"][-6:-4])
        assert decode_image(row["image"]["bytes"], 10**6).shape[:2] == sizes[index % 4]


def test_a_dry_run_writes_nothing_and_counts_what_is_left(world, purified, tmp_path):
    plan = verbs.purify_plan(world.poisoned, str(tmp_path / "new"), denoiser=world.denoiser, settings=SHARDS)
    assert (plan.planned, plan.images_left, plan.shards, plan.shards_left) == (240, 240, 8, 8)
    written = sum(file.stat().st_size for file in (purified[0] / "data").glob("*.parquet"))
    assert plan.input_bytes == sum(f.stat().st_size for f in (world.root / "poisoned/data").glob("*.parquet"))
    # Noise is removed, so the output is smaller than what the sample of the source says.
    assert written / 2 < plan.output_bytes < 2 * written
    assert plan.cpu_hours > 0
    assert plan.device_hours > 0
    assert not (tmp_path / "new").exists()
    again = verbs.purify_plan(world.poisoned, str(purified[0]), denoiser=world.denoiser, settings=SHARDS)
    assert (again.images_left, again.shards_left, again.output_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "images", "settings", "expected"),
    [
        ([(32, 32)], 3700, {}, 512),
        ([(32, 32)], 50_000, {}, 1563),
        ([(32, 32)], 1_281_167, {}, 4096),
        ([(32, 32)], 50_000, {"purify.shard_images": 100}, 100),
        ([(32, 32)], 50_000, {"purify.shard_images": 100, "purify.shard_bytes": 2**16}, 21),
        # Of photographs 64 MiB, or a 32nd where that is less.
        ([(500, 375)], 1_281_167, {}, 119),
        ([(500, 375)], 2000, {}, 63),
        ([(500, 375)], 300, {}, 29),
        # One that is much larger counts for what it has, and does not make all shards small.
        ([(500, 375)] * 63 + [(2000, 1875)], 1_281_167, {}, 91),
        ([(500, 375)] * 63 + [(6000, 4000)], 1_281_167, {}, 39),
        ([(6000, 4000)], 1000, {}, 1),
        ([], 10, {}, 512),
    ],
)
def test_a_source_is_cut_by_images_and_by_bytes(sizes, images, settings, expected):
    samples = [prepare.Sample("", "", *size, crop=np.zeros((1, 1, 3), np.uint8)) for size in sizes]
    assert prepare._images_per_shard(resolve(None, settings, {}), samples, images) == expected


def test_samples_are_spread_over_the_source(tmp_path):
    """Images of a class often have sizes of their own, and the first ones would say nothing of the others."""
    for label, side in (("a", 20), ("b", 40)):
        fill(tmp_path / label, *(f"{index:02d}.png" for index in range(60)), images=noise(60, side))
    heights = [sample.height for sample in samples_of(tmp_path)]
    assert (len(heights), heights.count(20), heights.count(40)) == (60, 30, 30)


def parquet_files(folder, count):
    """Write `count` Parquet files of 10 images each."""
    for number in range(count):
        table = table_of(noise(10, 20, seed=number), ids=[f"{number:02d}-{row}" for row in range(10)])
        (folder / f"{number:02d}.parquet").write_bytes(table_to_parquet(table))


def test_few_objects_of_many_images_are_opened_for_samples(tmp_path, monkeypatch):
    parquet_files(tmp_path, 20)
    opened, read = [], prepare.read_parts
    monkeypatch.setattr(prepare, "read_parts", lambda *given: opened.append(given[1][0]) or read(*given))
    assert len(samples_of(tmp_path)) == 64
    assert [key for key, _, _ in opened] == [f"{number:02d}.parquet" for number in range(0, 20, 3)]
    assert max(stop for _, _, stop in opened) == 10


def test_an_object_that_cannot_be_read_does_not_end_the_sampling(tmp_path, monkeypatch):
    """Its images become error rows, wherever it lies; what nothing can be read of is refused at once."""
    parquet_files(tmp_path, 4)
    read, damaged = prepare.read_parts, {"00.parquet", "02.parquet"}

    def read_some(*given):
        if given[1][0][0] in damaged:
            raise InputError(f"{given[1][0][0]}: damaged")
        return read(*given)

    monkeypatch.setattr(prepare, "read_parts", read_some)
    assert len(samples_of(tmp_path)) == 20
    with pytest.raises(InputError, match=r"00\.parquet: damaged"):
        samples_of(tmp_path, data__on_error="stop")
    damaged |= {"01.parquet", "03.parquet"}
    with pytest.raises(InputError, match=r"00\.parquet: damaged"):
        samples_of(tmp_path)


@pytest.mark.parametrize(("tile", "overlap", "pixels"), [(64, 0, 60 * 40), (32, 0, 60 * 40), (32, 8, 6 * 26 * 24)])
def test_a_dry_run_counts_what_tiles_compute_twice(world, tmp_path, monkeypatch, tile, overlap, pixels):
    source = fill(tmp_path / "src", "a/0.png", "a/1.png", "a/2.png", images=noise(3, 60, 40))
    # A clock that goes by the pixels that the network sees: an hour for each.
    seen = [0.0]
    forward = Denoiser.forward

    def counted(self, x_t, t):
        seen[0] += 3600.0 * x_t.numel() / 3
        return forward(self, x_t, t)

    monkeypatch.setattr(Denoiser, "forward", counted)
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: seen[0])
    settings = {"purify.tile": tile, "purify.tile_overlap": overlap}
    plan = verbs.purify_plan(source, str(tmp_path / "new"), denoiser=world.denoiser, settings=settings)
    # Of 60 x 40 pixels: one tile, then 2 x 2 of 30 x 20, then 3 x 2 of 26 x 24.
    assert plan.device_hours == 3 * pixels


@pytest.mark.parametrize("fast", ["bfloat16", "float32"])
def test_an_opened_denoiser_has_the_fast_precision_unless_one_is_set(world, monkeypatch, fast):
    monkeypatch.setattr(network, "fast_precision", lambda _device: fast)
    assert open_denoiser(world.denoiser, None).precision == fast
    assert open_denoiser(world.denoiser, "float32").precision == "float32"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"purify.precision": "int8"}, "int8 is for the default network"),
        ({"purify.tile_overlap": 257}, "tile_overlap 257 exceeds half of a tile, which has 512 pixels"),
    ],
)
def test_what_the_network_cannot_do_is_refused_before_anything_is_written(
    world, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setattr(network, "ShuffledNetwork", type("Other", (), {}))
    with pytest.raises(ConfigError, match=words):
        verbs.purify(world.poisoned, str(tmp_path / "new"), denoiser=world.denoiser, settings=settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.chaos
def test_a_source_that_grew_is_extended(world, tmp_path):
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(world.poisoned, source)
    settings = {**SHARDS, "purify.shard_images": 120}
    first = verbs.purify(str(source), str(output), denoiser=world.denoiser, settings=settings)
    before = object_names(output)
    table = pq.read_table(sorted((source / "data").glob("*.parquet"))[0]).slice(0, 8)
    ids = pa.array([f"new-{row}" for row in range(8)])
    pq.write_table(table.set_column(table.column_names.index("id"), "id", ids), source / "data/a-new.parquet")
    with pytest.raises(ResumeError, match="add --extend"):
        verbs.purify(str(source), str(output), denoiser=world.denoiser, settings=settings)
    grown = verbs.purify(str(source), str(output), denoiser=world.denoiser, extend=True, settings=settings)
    assert (first.planned, grown.planned, grown.ok) == (240, 248, 248)
    after = object_names(output)
    assert {name: after[name] for name in before} == before
    assert verbs.verify(str(output)).ok


def test_two_images_of_one_id_are_refused(world, tmp_path):
    (tmp_path / "source").mkdir()
    table = pq.read_table(sorted((world.root / "poisoned/data").glob("*.parquet"))[0]).slice(0, 4)
    ids = pa.array(["a", "b", "b", "c"])
    pq.write_table(table.set_column(table.column_names.index("id"), "id", ids), tmp_path / "source/x.parquet")
    fatal = decode(*first_shard(world, tmp_path / "out", tmp_path / "source"))["fatal"][0].as_py()
    error = error_of_note(fatal)
    assert isinstance(error, InputError)
    assert "id b occurs more than once" in str(error)


def test_what_cannot_be_read_becomes_error_rows_of_its_own(world, tmp_path):
    verbs.convert(world.test, str(tmp_path / "source"), layout="folder", settings=DEBUG)
    job, task = first_shard(world, tmp_path / "out", tmp_path / "source")
    gone = [span.key for span in task.shard.spans][3]
    (tmp_path / "source" / gone).unlink()
    decoded = decode(job, task)
    table, images, failures = unpack(decoded)
    assert (table.num_rows, len(images)) == (15, 15)
    assert [(row["id"], row["key"]) for row in failures] == [(gone, gone)]
    assert "is a link to a missing file, or was deleted after the source was listed" in failures[0]["error"]
    assert decoded["fatal"][0].as_py() == ""
    strict = replace(job, source=replace(job.source, data=DataConfig(on_error="stop")))
    stopped = str(error_of_note(decode(strict, task)["fatal"][0].as_py()))
    assert "is a link to a missing file, or was deleted after the source was listed" in stopped
