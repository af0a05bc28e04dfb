"""The audit's scores and verdicts on drawn images: planted patterns are found, clean images are not."""

import pytest
import torch

from eclipse_ray import detection as scores
from eclipse_ray.config import load_config
from eclipse_ray.datasets.synthetic import draw_synthetic
from eclipse_ray.detection import (
    VIEWS,
    Images,
    Score,
    bands,
    check_labels,
    compare,
    holm,
    judge,
    mirror,
    rows_of,
    score_images,
)
from eclipse_ray.errors import InputError
from eclipse_ray.poisons import poison_images

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 600


@pytest.fixture(scope="module")
def drawn():
    images, labels = draw_synthetic(COUNT + 300, 32, 3)
    return torch.from_numpy(images), torch.from_numpy(labels)


def sample_of(drawn, name: str = "") -> Images:
    images, labels = drawn[0][:COUNT], drawn[1][:COUNT]
    if name:
        config = load_config(None, {"poison.name": name}).poison
        images = poison_images(images, labels, [f"i{row}" for row in range(COUNT)], config, 0, 10)
    return Images(images.permute(0, 3, 1, 2).contiguous(), labels)


def clean_of(drawn, labelled: bool = True) -> Images:
    return Images(drawn[0][COUNT:].permute(0, 3, 1, 2).contiguous(), drawn[1][COUNT:] if labelled else None)


def test_views_turn_their_sign_with_the_mirror(drawn):
    sample = sample_of(drawn)
    denoised = (sample.images // 2) * 2
    for each in (sample, Images(sample.images, None, denoised)):
        turned = Images(each.images.flip(-1), None, None if each.denoised is None else each.denoised.flip(-1))
        for name, view in VIEWS.items():
            one, other = (rows_of(images.take(torch.arange(40)), view) for images in (each, turned))
            assert float(one.abs().max()) > 0, name
            assert torch.allclose(one, -other, atol=1e-3), name
        assert torch.allclose(rows_of(each, bands), rows_of(turned, bands), atol=1e-3)


def test_clean_images_are_called_clean(drawn):
    sample = sample_of(drawn)
    finding = judge(sample, score_images(sample, clean_of(drawn), 0), 0.01)
    assert (finding.verdict, finding.frequency, finding.scope) == ("clean", None, None)
    assert finding.p_value > 0.01


@pytest.mark.parametrize(
    ("name", "frequency", "scope"),
    [("urp", "high", "class"), ("lsp", "low", "class"), ("ar", "high", "sample"), ("cuda", None, "class")],
)
def test_poisons_are_found_without_a_clean_set(drawn, name, frequency, scope):
    sample = sample_of(drawn, name)
    finding = judge(sample, mirror(sample, 0), 0.01)
    assert finding.verdict == "poisoned"
    assert finding.p_value <= 0.01
    assert finding.scope == scope
    assert frequency in (None, finding.frequency)


def test_a_weak_pattern_that_a_class_shares_is_told_by_its_colour(drawn):
    sample, generator = sample_of(drawn), torch.Generator().manual_seed(0)
    assert sample.labels is not None
    patterns = torch.where(torch.rand(10, 3, 32, 32, generator=generator) < 0.5, -3, 3)
    weak = (sample.images + patterns[sample.labels]).clamp(0, 255).to(torch.uint8)
    own = patterns[sample.labels[torch.randperm(COUNT, generator=generator)]]
    of_no_class = (sample.images + own).clamp(0, 255).to(torch.uint8)
    assert judge_as_predictable(Images(weak, sample.labels)).scope == "class"
    assert judge_as_predictable(Images(of_no_class, sample.labels)).scope == "sample"


def judge_as_predictable(sample: Images):
    return judge(sample, [Score("predictability", 1.0, 0.0, 1e-4, "mirror", "")], 0.01)


def test_the_share_of_class_means_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 4
    noise, patterns = (torch.randn(count, 50, generator=generator) for count in (4000, 4))
    assert abs(scores.class_mean_share(noise, labels)) < 0.001
    expected = float(patterns.square().mean()) / (1 + float(patterns.square().mean()))
    assert scores.class_mean_share(noise + patterns[labels], labels) == pytest.approx(expected, abs=0.01)
    assert scores.class_mean_share(torch.zeros(8, 3), labels[:8]) == 0


def test_a_pattern_that_respects_the_mirror_is_found_with_a_clean_set(drawn):
    sample, generator = sample_of(drawn), torch.Generator().manual_seed(0)
    # Each image has stripes of its own strength, whose fineness tells the class.
    across = torch.arange(32)
    waves = torch.stack([torch.cos(2 * torch.pi * (across - 15.5) * (3 + label) / 32) for label in range(10)])
    strength = 8 * torch.rand(COUNT, 1, 1, 1, generator=generator) + 4
    assert sample.labels is not None
    stripes = waves[sample.labels].view(COUNT, 1, 1, 32) * strength
    striped = Images((sample.images + stripes).round().clamp(0, 255).to(torch.uint8), sample.labels)
    assert judge(striped, mirror(striped, 0), 0.01).verdict == "clean"
    (transfer,) = compare(striped, clean_of(drawn), 0)
    assert transfer.name == "transfer"
    assert transfer.p_value <= 0.001
    assert judge(striped, [*mirror(striped, 0), transfer], 0.01).verdict == "poisoned"
    assert compare(striped, clean_of(drawn, labelled=False), 0) == []


def test_scores_are_the_same_for_the_same_seed(drawn):
    sample = sample_of(drawn)
    assert mirror(sample, 5) == mirror(sample, 5)


def test_p_values_are_uniform_where_the_null_holds():
    generator = torch.Generator().manual_seed(0)
    flips, means, swaps = [], [], []
    labels = torch.arange(60) % 3
    for _ in range(200):
        # Of unequal spread, as images are.
        rows = torch.randn(60, 4, generator=generator) * torch.rand(60, 1, generator=generator)
        flips.append(scores.sign_flips(rows[:, 0], 0.0, 199, generator)[1])
        means.append(scores.class_mean_flips(rows, labels, 0.0, 199, generator)[1])
        swaps.append(scores.two_samples(rows[:40, 1], rows[40:, 1], 0.0, 199, generator)[1])
    for found in (flips, means, swaps):
        p_values = torch.tensor(found)
        for level in (0.1, 0.5):
            # Four standard deviations of a proportion of 200.
            assert abs(float((p_values <= level).float().mean()) - level) < 4 * (level * (1 - level) / 200) ** 0.5


def test_a_tolerated_effect_is_not_significant():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=generator) + 0.03
    assert scores.sign_flips(values, 0.0, 199, generator)[1] < 0.01
    assert scores.sign_flips(values, 0.05, 199, generator)[1] > 0.5


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.02}) == pytest.approx({"a": 0.03, "c": 0.04, "b": 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_too_little_to_learn_from_is_refused(drawn):
    sample = sample_of(drawn)
    assert sample.labels is not None
    with pytest.raises(InputError, match="needs labels"):
        check_labels(Images(sample.images, None))
    with pytest.raises(InputError, match="99 images of 10 classes"):
        check_labels(sample.take(torch.arange(99)))
    with pytest.raises(InputError, match="images of 1 class, the"):
        check_labels(Images(sample.images, torch.zeros(COUNT, dtype=torch.int64)))
