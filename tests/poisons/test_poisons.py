"""Closed-form poisons: norms after storage, keyed noise, and the form of each of them."""

import math

import numpy as np
import pytest
import torch

from eclipse_ray.config import PoisonConfig
from eclipse_ray.errors import ConfigError, InputError
from eclipse_ray.poisons import (
    POISONS,
    ar,
    budget,
    check_poison,
    perturb,
    poison_images,
    resolved_poison,
    settings_of,
)
from eclipse_ray.poisons.ar import MARGIN, TAPS, generate, processes, published_processes
from eclipse_ray.poisons.cuda import class_filters, convolve
from eclipse_ray.poisons.interface import store
from eclipse_ray.poisons.lsp import default_patch
from tests.poisons.helpers import CLASSES, tiny_images

# Those of one scope have tests of their own below.
VARIANTS = [(name, scope) for name in ("urp", "lsp", "ar", "ar-published") for scope in ("sample", "class")]


def batch(count=8, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % CLASSES, [f"image-{index}" for index in range(count)]


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize(("name", "scope"), VARIANTS)
def test_norm_holds_after_storage(name, scope, size):
    config = PoisonConfig(name=name, scope=scope)
    images, labels, ids = batch(size=size)
    stored = poison_images(images, labels, ids, config, 3, CLASSES)
    difference = (stored.double() - images.double()).flatten(1)
    norm, bound = budget(config, images.shape[1:])
    assert stored.dtype == torch.uint8
    assert stored.shape == images.shape
    if norm == "linf":
        assert difference.abs().max() <= 8
    else:
        assert difference.norm(dim=1).max() / 255 <= bound + math.sqrt(3 * size**2) / 510
        assert difference.norm(dim=1).min() / 255 >= 0.8 * bound


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_urp_uses_its_whole_bound_and_never_more(distribution):
    images, labels, ids = batch()
    for eps_255 in (1.0, 7.6, 8.0):
        config = PoisonConfig(name="urp", eps_255=eps_255, distribution=distribution)
        stored = poison_images(images, labels, ids, config, 0, CLASSES)
        assert int((stored.int() - images.int()).abs().max()) == math.floor(eps_255)
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        poison_images(images, labels, ids, PoisonConfig(name="urp", eps_255=0.5), 0, CLASSES)


def test_published_budgets():
    assert budget(PoisonConfig(name="urp"), (32, 32, 3)) == ("linf", 8 / 255)
    assert budget(PoisonConfig(name="ar"), (32, 32, 3)) == ("l2", 1.0)
    assert budget(PoisonConfig(name="lsp"), (32, 32, 3))[1] == pytest.approx(1.304, abs=1e-3)
    assert budget(PoisonConfig(name="lsp"), (224, 224, 3))[1] == pytest.approx(9.13, abs=1e-2)
    assert budget(PoisonConfig(name="ar", eps_255=127.5), (32, 32, 3)) == ("l2", 0.5)
    assert [default_patch(side, side) for side in (32, 64, 224)] == [8, 8, 32]


@pytest.mark.parametrize(("name", "scope"), [*VARIANTS, ("shift", None), ("mixture", None), ("cuda", None)])
def test_order_and_batch_do_not_matter_and_the_seed_does(name, scope):
    config = PoisonConfig(name=name, scope=scope)
    images, labels, ids = batch(count=13)
    whole = perturb(images, labels, ids, config, 5, CLASSES)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    for rows in order.split(5):
        again = perturb(images[rows], labels[rows], [ids[i] for i in rows], config, 5, CLASSES)
        assert torch.equal(again, whole[rows])
    assert any(not torch.equal(perturb(images, labels, ids, config, seed, CLASSES), whole) for seed in range(4))


@pytest.mark.parametrize(("name", "scope"), VARIANTS)
def test_seed_label_and_scope_decide(name, scope):
    config = PoisonConfig(name=name, scope=scope)
    images, labels, ids = batch()
    first = perturb(images, labels, ids, config, 0, CLASSES)
    assert first.dtype == torch.float32
    assert torch.equal(first, perturb(images, labels, ids, config, 0, CLASSES))
    assert not torch.allclose(first, perturb(images, labels, ids, config, 1, CLASSES))
    assert torch.equal(first[0], first[4]) == (scope == "class")  # images 0 and 4 share a class
    assert not torch.allclose(first[0], first[1])
    # More classes do not change the poison of those that were there.
    assert torch.equal(first, perturb(images, labels, ids, config, 0, CLASSES + 2))


def predicted(taps, signal):
    """Return what the recursion makes of the eight pixels before each pixel, (N, H - 2, W - 2, 3)."""
    height, width = signal.shape[1] - 2, signal.shape[2] - 2
    return sum(
        taps[:, None, None, :, index] * signal[:, down : down + height, right : right + width]
        for index, (down, right) in enumerate(TAPS)
    )


def test_ar_satisfies_its_recursion():
    images, labels, ids = batch()
    taps = processes(0, CLASSES, 32, 32)[labels.numpy()]
    signal = generate(taps, np.random.default_rng(0).standard_normal((8, 36, 36, 3)))
    np.testing.assert_allclose(predicted(taps, signal), signal[:, 2:, 2:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(taps.sum(axis=-1), 1, atol=1e-9)
    stored = perturb(images, labels, ids, PoisonConfig(name="ar"), 0, CLASSES).double().numpy()
    assert np.abs(predicted(taps, stored) - stored[:, 2:, 2:]).max() < 1e-6 * max(1, np.abs(taps).max())
    assert np.linalg.norm(stored.reshape(8, -1), axis=1) == pytest.approx(1.0, abs=1e-5)


def response(taps, signal):
    """The published figure: the filter of a process (its taps, then -1) over a unit-norm signal, ReLU, sum."""
    windows = np.lib.stride_tricks.sliding_window_view(signal / np.linalg.norm(signal), (3, 3), axis=(0, 1))
    filters = np.concatenate([taps, np.full((3, 1), -1.0)], axis=1).reshape(3, 3, 3)
    return np.maximum(np.einsum("ijcab,cab->ij", windows, filters), 0).sum()


@pytest.mark.parametrize("seed", [0, 1, None])
def test_ar_processes_meet_the_published_criteria(seed):
    taps = published_processes(10) if seed is None else processes(seed, 10, 32, 32)
    start = np.random.default_rng(1).standard_normal((10, 36, 36, 3))
    signals = generate(taps, start)[:, MARGIN:, MARGIN:]
    # Chosen on other starts, hence the slack to 50 and 10.
    assert np.linalg.norm(signals.reshape(10, -1), axis=1).max() < 2 * 50
    for later in range(10):
        assert response(taps[later], signals[later]) < 1e-9
        for earlier in range(later):
            assert response(taps[earlier], signals[later]) > 5


def test_published_ar_is_its_authors_and_writes_each_pixel_from_eight():
    # The first and the last class of params-classes-10-mr-10.pt.
    taps = published_processes(10)
    assert taps[0, 0].tolist() == [0.1561, -0.0710, 0.3743, -0.1896, 0.0461, 0.6075, 0.0539, 0.0226]
    assert taps[9, 2].tolist() == [0.2461, 0.1217, 0.1879, -0.0165, 0.1160, 0.1356, 0.1772, 0.0321]
    images, labels, ids = batch()
    change = perturb(images, labels, ids, PoisonConfig(name="ar-published"), 0, CLASSES).double().numpy()
    assert np.abs(predicted(taps[labels.numpy()], change) - change[:, 2:, 2:]).max() < 1e-6
    assert np.linalg.norm(change.reshape(8, -1), axis=1) == pytest.approx(1.0, abs=1e-5)
    # Its 100 processes serve from 11 classes on, and no more than 100.
    assert published_processes(11).shape == (100, 3, 8)
    with pytest.raises(ConfigError, match="published 100 processes, not 101; take ar"):
        published_processes(101)


def test_ar_tries_other_processes_where_the_first_leave_no_room_for_all(monkeypatch):
    seen, bounded = [], ar._bounded

    def counted(seed, chunk):
        seen.append(chunk)
        return bounded(seed, chunk)

    monkeypatch.setattr(ar, "_bounded", counted)
    monkeypatch.setattr(ar, "CHUNKS", 2)
    assert processes.__wrapped__(0, 6, 32, 32).shape == (6, 3, 8)
    assert 2 < len(seen) < 2 * ar.ATTEMPTS
    assert seen == sorted(set(seen))
    monkeypatch.setattr(ar, "ATTEMPTS", 1)
    with pytest.raises(ConfigError, match="different processes for 6 classes"):
        processes.__wrapped__(0, 6, 32, 32)


@pytest.mark.parametrize("size", [16, 30, 32])
def test_lsp_is_constant_on_patches(size):
    images, labels, ids = batch(size=size)
    values = perturb(images, labels, ids, PoisonConfig(name="lsp"), 0, CLASSES)
    for row in range(0, size, 8):
        for column in range(0, size, 8):
            patch = values[:, row : row + 8, column : column + 8]
            assert torch.equal(patch, patch[:, :1, :1].expand_as(patch))


def test_lsp_is_linearly_separable():
    images, _, _ = batch(count=1)
    labels = torch.arange(600) % 10
    ids = [str(index) for index in range(600)]
    values = perturb(images.expand(600, -1, -1, -1), labels, ids, PoisonConfig(name="lsp"), 0, 10)
    features = torch.cat([values[:, ::8, ::8].flatten(1).double(), torch.ones(600, 1).double()], dim=1)
    weights = torch.linalg.lstsq(features[:400], torch.eye(10).double()[labels[:400]]).solution
    accuracy = ((features[400:] @ weights).argmax(1) == labels[400:]).double().mean()
    assert accuracy > 0.99


def test_lsp_names_too_few_patches():
    images, labels, ids = batch(size=16)
    with pytest.raises(ConfigError, match="smaller patches"):
        perturb(images, labels, ids, PoisonConfig(name="lsp", patch=16), 0, 12)


def test_storage_rounds_and_never_truncates():
    images = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    config = PoisonConfig(name="ar", eps_255=1000)
    change = (torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)) * 6 - 3) / 255
    difference = (store(images, change, settings_of(config)).double() - 128) / 255 - change
    assert abs(float(difference.mean())) * 255 < 0.02
    assert float(difference.abs().max()) * 255 <= 0.5 + 1e-4


@pytest.mark.parametrize("name", ["ar", "lsp"])
def test_a_bound_of_which_rounding_leaves_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=r"poison\.eps_255 1: nothing of it is left"):
        poisoned(tiny_images(4), name=name, eps_255=1)


def test_an_empty_batch_stays_empty():
    images = torch.zeros(0, 32, 32, 3, dtype=torch.uint8)
    for name in POISONS:
        config = PoisonConfig(name=name)
        assert poison_images(images, torch.zeros(0).long(), [], config, 0, 10).shape == images.shape


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_integers_of_any_width(name, kind):
    images, labels, ids = batch()
    config = PoisonConfig(name=name)
    expected = perturb(images, labels, ids, config, 0, CLASSES)
    assert torch.equal(perturb(images, labels.to(kind), ids, config, 0, CLASSES), expected)


def test_bad_batches_are_refused():
    images, labels, ids = batch()
    config = PoisonConfig(name="ar")
    with pytest.raises(InputError, match="relabel"):
        perturb(images, labels, ids, config, 0, CLASSES - 1)
    with pytest.raises(InputError, match="ids"):
        perturb(images, labels, ids[:-1], config, 0, CLASSES)
    with pytest.raises(InputError, match="uint8"):
        perturb(images.float(), labels, ids, config, 0, CLASSES)


def poisoned(data, **settings):
    config = PoisonConfig.model_validate(settings)
    return poison_images(data.images, data.labels, data.ids, config, 0, data.num_classes)


def test_a_shift_moves_each_channel_of_a_class_by_the_bound_and_no_two_of_eight_classes_alike():
    images = torch.full((8, 5, 5, 3), 100, dtype=torch.uint8)
    config = PoisonConfig(name="shift")
    change = perturb(images, torch.arange(8), [f"{index}" for index in range(8)], config, 0, 8) * 255
    assert torch.equal(change, change[:, :1, :1].expand_as(change))
    torch.testing.assert_close(change.abs(), torch.full_like(change, 8.0))
    assert len({tuple(one.sign().tolist()) for one in change[:, 0, 0]}) == 8


def test_images_of_a_class_are_shifted_alike_whatever_their_ids():
    data = tiny_images(CLASSES * 2)
    first = poisoned(data, name="shift").int() - data.images.int()
    assert torch.equal(first[:CLASSES], first[CLASSES:])


def test_each_image_of_a_mixture_is_what_one_of_its_parts_alone_stores():
    data = tiny_images(64)
    parts = ("ar", "lsp", "urp", "shift", "cuda")
    mixed = poisoned(data, name="mixture", parts=parts)
    alone = torch.stack([poisoned(data, name=name) for name in parts])
    same = (alone == mixed).flatten(2).all(dim=2)
    assert (same.sum(dim=0) == 1).all()
    assert (same.sum(dim=1) >= 4).all(), "each part of five is drawn for some of 64 images"


@pytest.mark.parametrize("name", ["em", "mixture", "ops", "nothing"])
def test_a_part_that_is_no_closed_form_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"poison.parts: {name} is no closed-form poison; choose from urp"):
        check_poison(PoisonConfig(name="mixture", parts=("ar", name)))


def test_only_what_attacks_a_denoiser_takes_one():
    kept = resolved_poison(PoisonConfig(name="adp", variant="strong", denoiser="given"))
    assert kept.denoiser == "given"
    for config in (PoisonConfig(name=name, denoiser="given") for name in ("adp", "em", "ar")):
        with pytest.raises(ConfigError, match=r"poison\.denoiser: only adp with poison\.variant=strong"):
            resolved_poison(config)


def test_a_mixture_has_no_scope_and_no_bound_of_its_own():
    with pytest.raises(ConfigError, match=r"poison\.scope: expected 'sample', found 'class'"):
        settings_of(PoisonConfig(name="mixture", scope="class"))
    with pytest.raises(ConfigError, match=r"mixture has no such setting; there are .*poison\.parts"):
        settings_of(PoisonConfig(name="mixture", eps_255=4))


def test_each_class_has_one_filter_with_one_whole_tap():
    filters = class_filters(0, list(range(50)))
    assert ((filters == 1).flatten(1).sum(1) == 1).all()
    rest = filters[filters != 1]
    assert rest.min() > 0
    assert rest.max() < 0.3
    assert torch.equal(class_filters(0, [7, 7])[0], filters[7])
    assert len({int(one.flatten().argmax()) for one in filters}) == 9


def test_the_filter_is_linear():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    filters = class_filters(0, [0, 1, 2, 3])
    together = convolve(2 * first + second, filters)
    torch.testing.assert_close(together, 2 * convolve(first, filters) + convolve(second, filters))
    grouped = torch.nn.functional.conv2d(first[:1], filters[:1, None].expand(3, 1, 3, 3), padding=1, groups=3)
    torch.testing.assert_close(convolve(first[:1], filters[:1]), grouped)


def test_a_stored_image_is_its_convolution_divided_by_its_maximum():
    data = tiny_images(8)
    blurred = convolve(data.images.permute(0, 3, 1, 2).double() / 255, class_filters(0, data.labels.tolist()))
    expected = blurred / blurred.amax(dim=(1, 2, 3), keepdim=True)
    stored = poisoned(data, name="cuda")
    found = stored.permute(0, 3, 1, 2).double() / 255
    assert (found - expected).abs().max() <= 0.5 / 255 + 1e-9
    assert (found.amax(dim=(1, 2, 3)) == 1).all()
    assert (stored.int() - data.images.int()).abs().max() > 30, "no norm bounds it"


def test_black_stays_black_and_extreme_images_are_exact():
    data = tiny_images(3)
    data.images[0] = 0
    data.images[1] = 255
    stored = poisoned(data, name="cuda")
    assert int(stored[0].max()) == 0
    change = perturb(data.images, data.labels, data.ids, PoisonConfig(name="cuda"), 0, CLASSES) * 255
    assert torch.equal((data.images + change.double()).round().to(torch.uint8), stored)


def test_it_has_no_budget_and_takes_none():
    assert budget(PoisonConfig(name="cuda"), (16, 16, 3)) == ("none", float("inf"))
    with pytest.raises(ConfigError, match="eps_255: cuda has no such setting"):
        poisoned(tiny_images(2), name="cuda", eps_255=8)
