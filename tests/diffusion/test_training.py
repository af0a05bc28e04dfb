"""Fitting on the debug preset: it learns, resumes exactly, does not depend on the number of workers; crops."""

import io

import pytest
import torch

from eclipse_ray.config import PRESETS
from eclipse_ray.diffusion import training
from eclipse_ray.diffusion.network import build_denoiser
from eclipse_ray.diffusion.process import add_noise, cosine_alphas_cumprod
from eclipse_ray.diffusion.training import (
    MOST_SPOTS,
    TYPICAL_INVERSION,
    TYPICAL_SPOTS,
    _draw_batch,
    centre_crops,
    crops,
    draw_spots,
    enlarged_batch,
    image_buffer,
    learning_rate_at,
    loss_hybrid,
    run_fit,
    start_ema,
    start_fit,
    update_ema,
    worker_slice,
)
from tests.support import UNET
from tests.support import debug_config as debug

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# What preset `paper` changes in the method of training, without its sizes.
PAPER = UNET | {
    key: PRESETS["paper"]["denoiser"][key]
    for key in (
        "variance_type",
        "rescale_timesteps",
        "lr_decay",
        "warmup_iterations",
        "max_grad_norm",
        "ema_warmup",
        "dropout",
    )
}


def smooth_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def go_on(fit, count=8, reports=None, keep=lambda _: None, **options):
    """Run a fit to its end on `count` images, of which the first four are held out."""
    images = smooth_images(count)
    run_fit(fit, images[4:], images[:4], 0, [].append if reports is None else reports.append, keep, **options)
    return fit


def fit_all(config, perturb=None):
    reports, states = [], []

    def keep(fit):
        stream = io.BytesIO()
        torch.save(fit.state(), stream)
        states.append(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))

    return go_on(start_fit(config, 0, CPU), 40, reports, keep, perturb=perturb), reports, states


def test_denoising_beats_doing_nothing():
    _, reports, _ = fit_all(debug(iterations=150, learning_rate=3e-3))
    assert reports[-1].denoise_psnr > reports[-1].noisy_psnr + 3
    assert reports[-1].loss < reports[0].loss


def test_the_published_options_learn_too():
    _, reports, _ = fit_all(debug(**{**PAPER, "dropout": 0.0}, iterations=120, learning_rate=3e-3, ema_decay=0.97))
    assert reports[-1].denoise_psnr > reports[-1].noisy_psnr + 3
    assert reports[-1].denoise_psnr > reports[4].denoise_psnr + 3
    assert reports[-1].loss < reports[0].loss


def darker_each_time(batches, first):
    """Perturb every iteration by another amount."""
    return [torch.full_like(x0, -0.01 * (first + number)) for number, x0 in enumerate(batches)]


@pytest.mark.parametrize(("options", "perturb"), [({}, None), (PAPER, None), ({}, darker_each_time)])
def test_resumed_training_equals_an_uninterrupted_one(options, perturb):
    config = debug(iterations=40, checkpoint_every=20, **options)
    # Perturbations are made ahead, and the checkpoint lies among those of one call.
    assert 20 % max(1, training.AHEAD // config.batch_size)
    whole, _, states = fit_all(config, perturb)
    resumed = start_fit(config, 5, CPU)
    resumed.restore(states[0])
    assert resumed.iteration == 20
    go_on(resumed, 40, perturb=perturb)
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    assert resumed.history == whole.history


def watching(shown):
    """Return a wrapper of networks that keeps what they are given."""

    def wrap(network):
        network.unet.register_forward_pre_hook(lambda _module, inputs: shown.append(inputs))
        return network

    return wrap


def test_training_shows_the_network_what_sampling_shows_it():
    config = debug(**PAPER, iterations=1)
    shown = []
    go_on(start_fit(config, 0, CPU), wrap=watching(shown))
    t = _draw_batch(config, smooth_images(8)[4:], 0, 0, 0, 1)[2]
    # T is 20 here, so that every timestep is shown as 50.
    assert torch.equal(shown[0][1], t * 50.0)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_see_the_batch_of_one(workers):
    config, images = debug(batch_size=16), smooth_images(40)
    whole = _draw_batch(config, images, 3, 0, 0, 1)
    parts = [_draw_batch(config, images, 3, 0, rank, workers) for rank in range(workers)]
    for index in range(4):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    assert [len(part[2]) for part in parts] == [
        len(range(16)[worker_slice(16, r, workers)]) for r in range(workers)
    ]


def test_the_mean_gradient_of_two_slices_is_that_of_the_batch():
    config, images = debug(**{**PAPER, "dropout": 0.0}), smooth_images(40)
    network, schedule = build_denoiser(start_fit(config, 0, CPU).unet, config), cosine_alphas_cumprod(20)

    def gradient(rank, world_size):
        x0, epsilon, t, delta = _draw_batch(config, images, 3, 0, rank, world_size)
        loss = loss_hybrid(network, x0, epsilon, t, schedule, 1e-3, delta).mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])

    halves = torch.stack([gradient(rank, 2) for rank in range(2)]).mean(dim=0)
    assert torch.allclose(halves, gradient(0, 1), atol=1e-6)


def test_spots_are_one_to_four_pixels_of_any_colour_on_a_share_of_the_images():
    which, colours = draw_spots((4000, 6, 5), 0.3, torch.Generator().manual_seed(0))
    assert which.shape == (4000, 1, 6, 5)
    counts = which.sum(dim=(1, 2, 3))
    assert (counts > 0).float().mean() == pytest.approx(0.3, abs=0.03)
    # Two spots may meet, which makes of four three.
    assert counts.unique().tolist() == list(range(MOST_SPOTS + 1))
    assert which.float().mean(dim=0).flatten().tolist() == pytest.approx([0.3 * 2.5 / 30] * 30, rel=0.4)
    drawn = colours.permute(0, 2, 3, 1)[which[:, 0]]
    assert drawn.mean(dim=0).tolist() == pytest.approx([0] * 3, abs=0.05)
    assert drawn.std(dim=0).tolist() == pytest.approx([3**-0.5] * 3, abs=0.02)
    assert not bool((colours * ~which).any())


def test_spots_leave_all_other_draws_as_they_were():
    images = smooth_images(40)
    plain, spotted = (_draw_batch(debug(spots=share), images, 3, 0, 0, 1) for share in (0.0, 1.0))
    for one, other in zip(plain[:3], spotted[:3], strict=True):
        assert torch.equal(one, other)
    assert plain[3] is None
    changed = (spotted[3] != 0).any(dim=1)
    assert 1 <= int(changed.sum(dim=(1, 2)).min()) <= int(changed.sum(dim=(1, 2)).max()) <= MOST_SPOTS
    assert float((spotted[0] + spotted[3]).abs().max()) <= 1


@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_training_shows_spots_and_asks_for_the_image_without_them(moved):
    """Whether victims are better for it takes larger networks and longer training: docs/results.md."""
    config, shown, reports = debug(iterations=1, spots=1.0), [], []
    copy = build_denoiser(start_fit(config, 0, CPU).unet, config)
    perturb = (lambda batches, _first: [torch.full_like(x0, moved) for x0 in batches]) if moved else None
    go_on(start_fit(config, 0, CPU), 8, reports, wrap=watching(shown), perturb=perturb)
    x0, epsilon, t, delta = _draw_batch(config, smooth_images(8)[4:], 0, 0, 0, 1)
    assert bool((delta != 0).any())
    assert torch.equal(shown[0][0], add_noise(x0 + (delta + moved), epsilon, t, copy.alphas_cumprod))
    typical = TYPICAL_INVERSION if moved else TYPICAL_SPOTS
    loss = loss_hybrid(copy, x0, epsilon, t, copy.alphas_cumprod, config.vlb_weight, delta + moved, typical).mean()
    assert reports[0].loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(("workers", "together"), [(1, 4), (2, 8)])
def test_perturbations_are_asked_for_several_iterations_at_once(workers, together):
    config, asked = debug(iterations=11, batch_size=training.AHEAD // 4, spots=0.0), []

    def perturb(batches, first):
        asked.append((first, len(batches)))
        return batches

    made = list(training._batches(config, smooth_images(8), 1, 0, 0, workers, perturb))
    assert asked == [(first, min(together, 11 - first)) for first in range(1, 11, together)]
    assert len(made) == 10
    assert all(torch.equal(x0, delta) for x0, _, _, delta in made)


@pytest.mark.parametrize(
    ("set_to", "fast", "precision"), [(None, "bfloat16", "bfloat16"), ("float32", "bfloat16", "float32")]
)
def test_training_takes_the_fast_precision_unless_one_is_set(monkeypatch, set_to, fast, precision):
    monkeypatch.setattr(training, "fast_precision", lambda _device: fast)
    seen = []

    def wrap(network):
        seen.append(network.precision)
        return network

    go_on(start_fit(debug(iterations=1, precision=set_to), 0, CPU), wrap=wrap)
    assert seen == [precision]


def test_timesteps_stay_below_t_max():
    config = debug(batch_size=256)
    drawn = torch.cat([_draw_batch(config, smooth_images(4), i, 0, 0, 1)[2] for i in range(4)])
    assert drawn.min() == 0
    assert drawn.max() == config.t_max - 1


def test_replication_is_a_weight_every_image_equally_often_in_an_epoch():
    images, replication, batch = 10, 4, 25
    epoch = torch.cat([enlarged_batch(images, replication, batch, i, seed=0) for i in range(2)])
    assert torch.bincount(epoch, minlength=images).tolist() == [5] * 10
    following = torch.cat([enlarged_batch(images, replication, batch, i, seed=0) for i in range(2, 4)])
    assert torch.bincount(following, minlength=images).tolist() == [5] * 10
    assert not torch.equal(epoch, following)


def test_a_batch_may_straddle_epochs():
    drawn = torch.cat([enlarged_batch(3, 0, 4, i, seed=1) for i in range(3)])
    assert torch.bincount(drawn, minlength=3).tolist() == [4, 4, 4]


def test_learning_rate_warms_up_and_decays():
    config = debug(iterations=1000, learning_rate=1.0)
    assert learning_rate_at(config, 0) < 0.02
    assert learning_rate_at(config, 100) > 0.95
    assert learning_rate_at(config, 999) < 1e-4
    published = debug(**PAPER, iterations=1000, learning_rate=1.0)
    assert {learning_rate_at(published, iteration) for iteration in (0, 50, 999)} == {1.0}
    slow = debug(iterations=1000, learning_rate=1.0, lr_decay="none", warmup_iterations=200)
    assert learning_rate_at(slow, 99) == 0.5


def test_gradients_are_cut_only_if_asked():
    """AdamW hardly minds the length of a gradient, but plain descent shows it."""
    moved = {}
    for limit in (None, 1e-3):
        config = debug(iterations=1, max_grad_norm=limit, warmup_iterations=0, learning_rate=1.0)
        fit = start_fit(config, 0, CPU)
        fit.optimizer = torch.optim.SGD(fit.unet.parameters())
        before = torch.cat([value.flatten().clone() for value in fit.unet.state_dict().values()])
        go_on(fit)
        after = torch.cat([value.flatten() for value in fit.unet.state_dict().values()])
        moved[limit] = float((after - before).norm())
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.05)
    assert moved[None] > 0.01


def test_average_follows_the_weights():
    module = torch.nn.Linear(2, 2)
    average = start_ema(module)
    start = {name: value.clone() for name, value in average.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    update_ema(average, module, decay=0.9, iteration=10**6)
    for name, value in average.items():
        assert torch.allclose(value, start[name] + 0.1, atol=1e-6)
    update_ema(average, module, decay=0.9999, iteration=0)
    for name, value in average.items():
        assert torch.allclose(value, start[name] + 0.1 + 0.9 * 0.9, atol=1e-6)
    start = {name: value.clone() for name, value in average.items()}
    update_ema(average, module, decay=0.9999, iteration=0, warmup=False)
    for name, value in average.items():
        assert torch.allclose(value, torch.lerp(start[name], module.state_dict()[name], 1e-4), atol=1e-9)


def numbered(*sizes):
    """Images whose red is the row, green the column and blue the image's number."""
    images = []
    for number, (height, width) in enumerate(sizes):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        images.append(torch.stack([rows, columns, torch.full_like(rows, number)], dim=-1).to(torch.uint8))
    return image_buffer(torch.cat([image.flatten() for image in images]), torch.tensor(sizes))


def test_a_crop_is_a_piece_of_its_image():
    images = numbered((16, 16), (20, 40), (90, 17))
    indices = torch.tensor([2, 0, 1, 1])
    cut = crops(images, indices, torch.rand(4, 2, dtype=torch.float64), 16)
    for crop, index in zip(cut, indices.tolist(), strict=True):
        assert (crop[..., 2] == index).all()
        assert (crop[:, 0, 0] == crop[0, 0, 0] + torch.arange(16)).all()
        assert (crop[0, :, 1] == crop[0, 0, 1] + torch.arange(16)).all()


def test_every_position_is_equally_likely():
    places = torch.rand(6000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = crops(numbered((18, 17)), torch.zeros(6000, dtype=torch.int64), places, 16)
    down, across = torch.bincount(cut[:, 0, 0, 0]), torch.bincount(cut[:, 0, 0, 1])
    assert len(down) == 3
    assert len(across) == 2
    # Four standard deviations of a binomial count.
    assert (down - 2000).abs().max() < 150
    assert (across - 3000).abs().max() < 160


def test_an_image_of_the_training_size_is_taken_whole():
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(crops(images, indices, torch.rand(3, 2), 16), images[indices])


def test_the_centre_crop_is_the_middle():
    cut = centre_crops(numbered((20, 16), (16, 33)), 16)
    assert cut[:, 0, 0].tolist() == [[2, 0, 0], [0, 9, 1]]


def test_two_workers_cut_the_crops_of_one():
    config, images = debug(batch_size=8), numbered((40, 30), (16, 90), (17, 17))
    whole = _draw_batch(config, images, 3, 0, 0, 1)[0]
    halves = [_draw_batch(config, images, 3, 0, rank, 2)[0] for rank in range(2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, _draw_batch(config, images, 4, 0, 0, 1)[0])
