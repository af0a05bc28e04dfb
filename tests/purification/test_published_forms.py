"""A published poison is purified and goes back in the form in which it came, as its training script loads it."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from eclipse_ray import verbs
from eclipse_ray.config import DataConfig
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.errors import InputError
from eclipse_ray.reports.folder import Purification
from eclipse_ray.reports.purified import facts
from eclipse_ray.storage.store import Store
from tests.datasets.helpers import fill, noise
from tests.support import DEBUG

PIXELS = noise(12, 16)
LABELS = np.array([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1, 2])


def pickled_pairs(folder):
    pairs = [(image.tobytes(), int(label)) for image, label in zip(PIXELS, LABELS, strict=True)]
    (folder / "EM.pkl").write_bytes(pickle.dumps(pairs))


def load_pickled_pairs(folder):
    # As ECLIPSE and COIN do: Image.frombytes("RGB", (32, 32), item).
    pairs = pickle.loads((folder / "data.pkl").read_bytes())
    images = [np.asarray(Image.frombytes("RGB", (16, 16), item)) for item, _ in pairs]
    return np.stack(images), [label for _, label in pairs]


def tensors(folder):
    data = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2) / 255).float()
    torch.save({"data": data, "labels": torch.from_numpy(LABELS)}, folder / "unlearnable_cifar10.pt")


def load_tensors(folder):
    found = torch.load(folder / "data.pt", weights_only=True)
    assert found["data"].dtype == torch.uint8
    assert found["data"].is_contiguous()
    return found["data"].permute(0, 2, 3, 1).numpy(), found["labels"].tolist()


def arrays(folder):
    np.save(folder / "poisoned_training_data.npy", PIXELS.astype(np.float64))
    np.save(folder / "poisoned_training_labels.npy", LABELS.astype(np.float64))


def load_arrays(folder):
    return np.load(folder / "images.npy"), np.load(folder / "labels.npy").tolist()


def archive(folder):
    np.savez(folder / "data_targets.npz", data=PIXELS, targets=LABELS)


def load_archive(folder):
    parts = [np.load(file) for file in sorted(folder.glob("part-*.npz"))]
    images, labels = (np.concatenate([part[name] for part in parts]) for name in ("images", "labels"))
    return images, labels.tolist()


def numbered(folder):
    fill(folder / "data", *(f"{number}.png" for number in range(len(PIXELS))), images=PIXELS)


def load_numbered(folder):
    # As the loaders of TAP and AR do: the label is that of CIFAR-10 by the number in the name.
    images = [np.asarray(Image.open(folder / "data" / f"{number}.png")) for number in range(len(PIXELS))]
    return np.stack(images), LABELS.tolist()


def classes(folder):
    fill(folder, *(f"{label}/{number}.png" for number, label in enumerate(LABELS)), images=PIXELS)


def load_classes(folder):
    files = sorted(folder.glob("[0-9]/*.png"), key=lambda file: int(file.stem))
    return np.stack([np.asarray(Image.open(file)) for file in files]), [int(file.parent.name) for file in files]


FORMS = {
    "pkl": (pickled_pairs, load_pickled_pairs, "pkl"),
    "pt": (tensors, load_tensors, "pt"),
    "npy": (arrays, load_arrays, "npy"),
    "npz": (archive, load_archive, "npz"),
    "numbered PNG": (numbered, load_numbered, "folder"),
    "PNG by class": (classes, load_classes, "folder"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_purified_poison_goes_back_as_it_came(world, tmp_path, form):
    make, load, layout = FORMS[form]
    (tmp_path / "src").mkdir()
    make(tmp_path / "src")
    (tmp_path / "src" / "readme.md").write_text("from a public repository")
    pure, back = tmp_path / "pure", tmp_path / "back"
    settings = {**DEBUG, "purify.actors": 1}
    done = verbs.purify(str(tmp_path / "src"), str(pure), denoiser=world.denoiser, settings=settings)
    assert (done.planned, done.ok) == (12, 12)
    (_, said), *_ = facts(Purification(Store(str(pure)))).rows
    assert said[-1] == "Of the source, 1 file is passed over: 1 .md, such as readme.md."
    verbs.convert(str(pure), str(back), layout=layout)
    images, labels = load(back)
    purified = load_images(str(pure), DataConfig())
    # A folder lists its images by name, other forms keep the order of the source.
    place = {id: row for row, id in enumerate(purified.ids)}
    order = list(range(12))
    if layout == "folder":
        tops = ["data"] * 12 if form == "numbered PNG" else LABELS.tolist()
        order = [place[f"{top}/{number}.png"] for number, top in enumerate(tops)]
    assert np.array_equal(images, purified.images[order])
    assert labels == LABELS.tolist()
    assert 0 < np.abs(images.astype(int) - PIXELS).mean() < 60
    # And the form is read again, so that it can be judged.
    again = load_images(str(back), DataConfig())
    assert (again.labels is None) == (form == "numbered PNG")
    assert sorted(again.hashes()) == sorted(purified.hashes())


def test_forms_that_cannot_hold_something_say_so(tmp_path):
    numbered(tmp_path)
    with pytest.raises(InputError, match="holds square images with labels; use the npy layout"):
        verbs.convert(str(tmp_path), str(tmp_path.parent / "out"), layout="pkl")
