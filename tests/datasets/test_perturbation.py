"""Published perturbations in their authors' layouts, added to a clean set; and labels found by content."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.formats import open_source
from eclipse_ray.datasets.matching import labels_from, match, pool
from eclipse_ray.datasets.perturbation import RECORD, apply
from eclipse_ray.datasets.write import convert
from eclipse_ray.errors import ConfigError, InputError
from tests.datasets.helpers import CONFIG, dump, fill, read_all, save, table_of, write_set
from tests.support import pixels_of

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
LABELS = np.arange(12)[::-1] % 5
IDS = [f"image-{number:02d}" for number in range(12)]
STEPS = RNG.integers(-8, 9, (12, 3, 32, 32))
UNIT = STEPS.astype(np.float32) / 255
CLASSES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def clean(tmp_path):
    return write(tmp_path / "clean", IMAGES)


def write(folder, images, labels=LABELS, classes=CLASSES):
    extras = pa.table({"extra": list(range(12))})
    return write_set(folder, table_of(images, labels, IDS, extras, classes), classes=classes)


def read(url):
    table = read_all(url)
    return table, pixels_of(table)


def poisoned(delta, clean, **choices):
    """Apply a perturbation file and return the images; ids, labels and columns must be those of the clean set."""
    output = str(delta) + ".poisoned"
    applied = apply(str(delta), clean, output, CONFIG, **choices)
    table, images = read(output)
    assert table.drop_columns("image").equals(read(clean)[0].drop_columns("image"))
    changes = images.astype(int) - IMAGES
    assert applied.linf_255 == np.abs(changes).max()
    changed = [np.linalg.norm(change) / 255 for change in changes]
    assert applied.l2 == pytest.approx(sum(changed) / max(1, applied.perturbed))
    assert applied.images == 12
    return images, applied


def expected(steps, images=IMAGES):
    """Add integer steps (N, 3, H, W) to images."""
    return (images.astype(int) + steps.transpose(0, 2, 3, 1)).clip(0, 255).astype(np.uint8)


def first_pixels(url):
    """Return the first value of each image by its id."""
    table, images = read(url)
    return dict(zip(table["id"].to_pylist(), images[:, 0, 0, 0].tolist(), strict=True))


def rows_up_to(count):
    """Return perturbations (count, 3, H, W) of which row i is i everywhere."""
    return np.arange(count, dtype=np.int16)[:, None, None, None] * np.ones((1, 3, 32, 32), np.int16)


@pytest.mark.parametrize(
    ("names", "row_of"),
    [
        # The number in the name, where text has 10 before 2.
        ([f"{n}.png" for n in range(12)], {f"{n}.png": n for n in range(12)}),
        ([f"img_{n}.png" for n in (3, 20, 100)], {"img_3.png": 0, "img_20.png": 1, "img_100.png": 2}),
        # Of several numbers the first one counts first.
        (
            [f"a_{n}_{k}.png" for n in (2, 10) for k in (1, 2, 10)],
            {f"a_{n}_{k}.png": 3 * i + j for i, n in enumerate((2, 10)) for j, k in enumerate((1, 2, 10))},
        ),
        (["2-x1.png", "10-x1.jpg"], {"2-x1.png": 0, "10-x1.jpg": 1}),
        # Text in all other cases, as torchvision's ImageFolder has class folders.
        (["cat/2.png", "cat/10.png", "dog/1.png"], {"cat/10.png": 0, "cat/2.png": 1, "dog/1.png": 2}),
        (["a2_1.png", "b10_2.png", "a10_3.png"], {"a10_3.png": 0, "a2_1.png": 1, "b10_2.png": 2}),
        (["b.png", "a.png"], {"a.png": 0, "b.png": 1}),
    ],
)
def test_rows_belong_to_numbered_files_by_their_number(tmp_path, capsys, names, row_of):
    clean = fill(tmp_path / "clean", *names, images=np.zeros((len(names), 32, 32, 3), np.uint8))
    np.save(tmp_path / "delta.npy", rows_up_to(len(names)))
    apply(str(tmp_path / "delta.npy"), clean, str(tmp_path / "out"), CONFIG)
    assert first_pixels(str(tmp_path / "out")) == row_of
    by_number = list(row_of) != sorted(row_of)
    assert ("images count by the numbers in their files' names" in capsys.readouterr().err) == by_number


def test_a_file_of_image_numbers_and_labels_beside_rows_count_numbered_files_by_their_number(tmp_path):
    names = [f"{n}.png" for n in range(12)]
    clean = fill(tmp_path / "clean", *names, images=np.zeros((12, 32, 32, 3), np.uint8))
    (tmp_path / "chosen.txt").write_text("2\n10\n")
    np.save(tmp_path / "two.npy", rows_up_to(3)[1:])
    apply(str(tmp_path / "two.npy"), clean, str(tmp_path / "two"), CONFIG, index=str(tmp_path / "chosen.txt"))
    assert {name: value for name, value in first_pixels(str(tmp_path / "two")).items() if value} == {
        "2.png": 1,
        "10.png": 2,
    }
    # LSP: the k-th row of a label is for the k-th image of that label.
    folder = tmp_path / "lsp"
    folder.mkdir()
    np.save(folder / "data.npy", rows_up_to(12))
    np.save(folder / "labels.npy", np.arange(12)[::-1] % 2)
    (tmp_path / "own.txt").write_text("".join(f"{n % 2}\n" for n in range(12)))
    config = DataConfig(source=clean, labels=str(tmp_path / "own.txt"))
    apply(str(folder / "data.npy"), clean, str(tmp_path / "by-label"), config, index="class")
    rows = {0: [1, 3, 5, 7, 9, 11], 1: [0, 2, 4, 6, 8, 10]}
    assert first_pixels(str(tmp_path / "by-label")) == {f"{n}.png": rows[n % 2][n // 2] for n in range(12)}


def test_rows_belong_to_numbered_batches_by_their_number(tmp_path):
    for number in range(1, 12):
        batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
        dump(tmp_path / f"train_data_batch_{number}", batch)
    np.save(tmp_path / "delta.npy", rows_up_to(22))
    apply(str(tmp_path / "delta.npy"), str(tmp_path / "train_data_batch_*"), str(tmp_path / "out"), CONFIG)
    found = first_pixels(str(tmp_path / "out"))
    assert found == {f"train_data_batch_{n}#{k}": 2 * (n - 1) + k for n in range(1, 12) for k in (0, 1)}


def npy(path, content):
    np.save(path, content)
    return path


# Each with the unit that is recognised.
FORMS = {
    "EM perturbation.pt": ("1", lambda t: save(t / "perturbation.pt", torch.from_numpy(UNIT))),
    "EM parameter": ("1", lambda t: save(t / "perturbation.pt", torch.nn.Parameter(torch.from_numpy(UNIT)))),
    "D-VAE float64": ("1", lambda t: save(t / "perturbation0.pt", torch.from_numpy(STEPS / 255))),
    "D-VAE ImageNet in 0..255": ("255", lambda t: save(t / "p.pt", torch.from_numpy(STEPS.astype(np.float32)))),
    "REM int8 pickle": ("255", lambda t: dump(t / "rem-fin-def-noise.pkl", STEPS.astype(np.int8))),
    "OPS npy": ("1", lambda t: npy(t / "perturbation.npy", UNIT.transpose(0, 2, 3, 1))),
    "UC dict": ("1", lambda t: save(t / "perturbation_1.pth", {"perturbation": torch.from_numpy(UNIT)})),
    "CP dict": ("8/255", lambda t: save(t / "cp.pth", {"model": {"delta": torch.from_numpy(UNIT * 255 / 8)}})),
}


@pytest.mark.parametrize("form", FORMS)
def test_sample_wise_perturbations_of_every_form_and_unit(tmp_path, clean, capfd, form):
    unit, make = FORMS[form]
    images, applied = poisoned(make(tmp_path), clean)
    assert np.array_equal(images, expected(STEPS))
    assert (applied.kind, applied.perturbed, applied.linf_255, applied.unit) == ("sample-wise", 12, 8, unit)
    err = capfd.readouterr().err
    assert f"in units of {unit}, signed, rounding nearest" in err
    assert "12 of 12 images changed by at most 8/255, mean L2 " in err


def test_the_record_says_how_it_was_applied(tmp_path, clean):
    delta = save(tmp_path / "perturbation.pt", torch.from_numpy(UNIT))
    poisoned(delta, clean, half="positive", rounding="truncate", seed=3)
    record = json.loads((tmp_path / "perturbation.pt.poisoned" / RECORD).read_text())
    assert record["delta"] == str(delta)
    assert record["clean"] == clean
    wanted = {"half": "positive", "rounding": "truncate", "unit": "1", "index": "order", "seed": 3}
    assert wanted.items() <= record.items()


def test_the_positive_half_is_what_the_official_loader_of_em_keeps(tmp_path, clean):
    images, _ = poisoned(
        save(tmp_path / "perturbation.pt", torch.from_numpy(UNIT)), clean, half="positive", rounding="truncate"
    )
    noise = torch.from_numpy(UNIT).mul(255).clamp_(0, 255).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, np.clip(IMAGES.astype(np.float32) + noise, 0, 255).astype(np.uint8))


def test_truncation_differs_from_rounding(tmp_path, clean):
    halves = npy(tmp_path / "delta.npy", np.full((12, 3, 32, 32), 1.75 / 255, np.float32))
    near, _ = poisoned(halves, clean)
    assert np.array_equal(near, expected(np.full((12, 3, 32, 32), 2)))
    (tmp_path / "again").mkdir()
    cut, _ = poisoned(npy(tmp_path / "again/delta.npy", np.load(halves)), clean, rounding="truncate")
    assert np.array_equal(cut, expected(np.full((12, 3, 32, 32), 1)))


def test_class_wise_perturbations_follow_the_label(tmp_path, clean):
    images, applied = poisoned(save(tmp_path / "perturbation.pt", torch.from_numpy(UNIT[:5])), clean)
    assert np.array_equal(images, expected(STEPS[LABELS]))
    assert applied.kind == "class-wise"


def test_index_class_takes_the_row_of_the_label(tmp_path, clean):
    images, _ = poisoned(save(tmp_path / "perturbation.pt", torch.from_numpy(UNIT)), clean, index="class")
    assert np.array_equal(images, expected(STEPS[LABELS]))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 32)])
def test_one_perturbation_for_all_images(tmp_path, clean, shape):
    images, applied = poisoned(npy(tmp_path / "perturbation.npy", UNIT[0].reshape(shape)), clean)
    assert np.array_equal(images, expected(np.broadcast_to(STEPS[0], STEPS.shape)))
    assert applied.kind == "universal"


def test_one_of_several_draws_per_image_depends_on_seed_and_id(tmp_path, clean):
    draws = np.stack([STEPS, -STEPS, STEPS // 2])
    delta = save(tmp_path / "perturbation.pt", torch.from_numpy(draws.astype(np.float32) / 255))
    images, _ = poisoned(delta, clean, seed=1)
    chosen = [
        [np.array_equal(image, expected(each[None], IMAGES[row : row + 1])[0]) for each in draws[:, row]].index(
            True
        )
        for row, image in enumerate(images)
    ]
    assert set(chosen) == {0, 1, 2}
    apply(str(delta), clean, str(tmp_path / "same"), CONFIG, seed=1)
    assert np.array_equal(read(str(tmp_path / "same"))[1], images)
    apply(str(delta), clean, str(tmp_path / "other"), CONFIG, seed=2)
    assert not np.array_equal(read(str(tmp_path / "other"))[1], images)


@pytest.mark.parametrize("rows", ["all", "subset", "one", "classes"])
@pytest.mark.parametrize("form", ["pkl", "npy", "pt", "list"])
def test_an_index_file_names_the_poisoned_images(tmp_path, clean, rows, form):
    chosen = np.array([7, 2, 11])
    index = {
        "pkl": lambda: dump(tmp_path / "idx-20.pkl", chosen),
        "npy": lambda: npy(tmp_path / "idx.npy", chosen),
        "pt": lambda: save(tmp_path / "idx.pt", torch.from_numpy(chosen)),
        "list": lambda: dump(tmp_path / "idx.pkl", chosen.tolist()),
    }[form]()
    steps = np.zeros_like(STEPS)
    stored, steps[chosen] = {
        "all": (UNIT, STEPS[chosen]),
        "subset": (UNIT[:3], STEPS[:3]),
        "one": (UNIT[:1], STEPS[:1]),
        "classes": (UNIT[:5], STEPS[LABELS[chosen]]),
    }[rows]
    images, applied = poisoned(save(tmp_path / "delta.pt", torch.from_numpy(stored)), clean, index=str(index))
    assert np.array_equal(images, expected(steps))
    assert applied.perturbed == 3


def test_the_kth_perturbation_of_a_label_goes_to_its_kth_image(tmp_path, clean):
    labels = np.repeat(np.arange(5), 3)
    steps = RNG.integers(-8, 9, (15, 3, 32, 32))
    delta = npy(tmp_path / "simple_data.npy", steps.transpose(0, 2, 3, 1).astype(np.float32) / 255)
    npy(tmp_path / "simple_label.npy", labels)
    images, _ = poisoned(delta, clean, index="class")
    rows = [3 * label + int((LABELS[:row] == label).sum()) for row, label in enumerate(LABELS)]
    assert np.array_equal(images, expected(steps[rows]))


def test_smaller_perturbations_lie_on_the_centre(tmp_path, clean):
    images, _ = poisoned(save(tmp_path / "delta.pt", torch.from_numpy(UNIT[:, :, :24, :24].copy())), clean)
    steps = np.zeros_like(STEPS)
    steps[:, :, 4:28, 4:28] = STEPS[:, :, :24, :24]
    assert np.array_equal(images, expected(steps))


@pytest.mark.parametrize(
    ("content", "choices", "words"),
    [
        (UNIT[:7], {}, "holds 7 perturbations for 12 images"),
        (UNIT[:3], {"index": "class"}, "holds no perturbation for image"),
        (np.tanh(UNIT * 100), {}, "its unit is doubtful"),
        (np.sign(UNIT), {}, "its unit is doubtful"),
        (UNIT * np.nan, {}, "not finite"),
        (UNIT * 1e5, {}, "ends at 255"),
        (np.zeros((12, 3, 64, 64)), {}, "bring the images to its size with --resize"),
        (np.zeros((12, 5)), {}, "expected perturbations as (N, 3, H, W)"),
        (UNIT, {"index": "nowhere.pkl"}, "nowhere.pkl: there is no such file"),
        ([torch.from_numpy(UNIT), list(range(12))], {}, "as TAP packs it"),
        ({"weight": torch.zeros(3)}, {}, "a dict of weight"),
        ([torch.zeros(3, 3) for _ in range(10)], {}, "holds list"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, clean, content, choices, words):
    delta = save(tmp_path / "delta.pt", content)
    if isinstance(content, np.ndarray):
        delta = npy(tmp_path / "delta.npy", content)
    with pytest.raises(InputError) as caught:
        apply(str(delta), clean, str(tmp_path / "out"), CONFIG, **choices)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_choices_are_refused(tmp_path, clean):
    delta = str(npy(tmp_path / "delta.npy", UNIT))
    for choice in ({"half": "negative"}, {"rounding": "up"}, {"unit": "2"}):
        with pytest.raises(ConfigError, match="is unknown"):
            apply(delta, clean, str(tmp_path / "out"), CONFIG, **choice)


def test_a_given_unit_settles_a_doubt(tmp_path, clean):
    delta = npy(tmp_path / "delta.npy", np.sign(STEPS).astype(np.float32))
    images, _ = poisoned(delta, clean, unit="8/255")
    assert np.array_equal(images, expected(8 * np.sign(STEPS)))


# ---- Labels by content


def test_images_without_labels_take_those_of_the_clean_set(tmp_path, clean):
    order = np.random.default_rng(3).permutation(12)
    data = fill(tmp_path / "data", *(f"{number}.png" for number in range(12)), images=expected(STEPS)[order])
    matched = labels_from(data, clean, str(tmp_path / "out"), CONFIG)
    table, images = read(str(tmp_path / "out"))
    assert matched.images == 12
    for name, label, image in zip(table["id"].to_pylist(), table["label"].to_pylist(), images, strict=True):
        row = order[int(name.removesuffix(".png"))]
        assert label == LABELS[row]
        assert np.array_equal(image, expected(STEPS)[row])
    assert open_source(str(tmp_path / "out"), CONFIG).classes == CLASSES


def test_labelled_images_are_resized_where_asked(tmp_path, clean):
    source = write(tmp_path / "source", expected(STEPS), labels=None, classes=None)
    labels_from(source, clean, str(tmp_path / "out"), DataConfig(resize=16))
    convert(source, str(tmp_path / "resized"), DataConfig(resize=16))
    table, images = read(str(tmp_path / "out"))
    assert table["label"].to_pylist() == LABELS.tolist()
    assert np.array_equal(images, read(str(tmp_path / "resized"))[1])


OTHERS = IMAGES.copy()
OTHERS[[1, 5]] = np.random.default_rng(9).integers(0, 256, (2, 32, 32, 3), np.uint8)
TWICE = IMAGES[[*range(3), 4, *range(4, 12)]]


@pytest.mark.parametrize(("images", "such"), [(OTHERS, "image-01"), (TWICE, "image-03")])
def test_other_images_and_two_of_one_clean_image_are_refused_with_their_number(tmp_path, clean, images, such):
    with pytest.raises(InputError, match=f"10 of 12 images match exactly one .* such as {such}"):
        labels_from(write(tmp_path / "source", images), clean, str(tmp_path / "out"), CONFIG)
    assert not (tmp_path / "out").exists()


def test_copies_in_the_clean_set_match_if_their_labels_agree(tmp_path):
    twice = IMAGES.copy()
    twice[3] = twice[8]
    assert LABELS[3] == LABELS[8]
    matched = labels_from(
        write(tmp_path / "s", twice), write(tmp_path / "c", twice), str(tmp_path / "out"), CONFIG
    )
    assert matched.images == 12
    assert read(str(tmp_path / "out"))[0]["label"].to_pylist() == LABELS.tolist()
    other = LABELS.copy()
    other[3] = 0
    with pytest.raises(InputError, match="10 of 12"):
        labels_from(str(tmp_path / "s"), write(tmp_path / "d", twice, labels=other), str(tmp_path / "o2"), CONFIG)


def test_a_clean_set_without_labels_is_refused(tmp_path, clean):
    bare = write(tmp_path / "bare", IMAGES, labels=None, classes=None)
    with pytest.raises(InputError, match="has no labels"):
        labels_from(clean, bare, str(tmp_path / "out"), CONFIG)


def test_pooling_is_the_mean_of_each_field():
    image = np.random.default_rng(2).integers(0, 256, (19, 32, 3), np.uint8)
    rows = [range(i * 19 // 8, (i + 1) * 19 // 8) for i in range(8)]
    fields = [
        [image[rows[i].start : rows[i].stop, 4 * j : 4 * j + 4].mean((0, 1)) for j in range(8)] for i in range(8)
    ]
    assert np.allclose(pool(image), np.array(fields).ravel(), atol=1e-4)


def test_matching_equals_a_search_in_full():
    images, clean = RNG.random((40, 192), np.float32) * 255, RNG.random((700, 192), np.float32) * 255
    nearest, margins, _ = match(images, clean, np.arange(700))
    distances = ((images[:, None].astype(np.float64) - clean) ** 2).sum(2)
    assert np.array_equal(nearest, distances.argmin(1))
    first, second = np.sort(distances, axis=1)[:, :2].T
    assert np.allclose(margins, second - first)


def test_the_published_tap_finds_its_labels_in_cifar_10(tmp_path, shared_data):
    tap, cifar = shared_data / "tap-published", shared_data / "cifar10"
    if not (tap.is_dir() and cifar.is_dir()):
        pytest.skip(f"no tap-published and cifar10 in {shared_data}; put both there to run this test")
    matched = labels_from(str(tap), f"{cifar}/train-*.parquet", str(tmp_path / "out"), CONFIG)
    assert matched.images == 10_000
    assert matched.margin > 3_000
    assert read_all(tmp_path / "out")["label"].equals(read_all(tap)["label"])
