"""Fitting on the debug preset: it learns, resumes exactly, and does not depend on the number of workers."""

import torch

from eclipse_ray.config import load_config
from eclipse_ray.diffusion.ema import start_ema, update_ema
from eclipse_ray.diffusion.losses import add_noise, loss_simple, psnr
from eclipse_ray.diffusion.schedule import cosine_alphas_cumprod
from eclipse_ray.diffusion.training import enlarged_batch, learning_rate_at, run_fit, start_fit

CPU = torch.device("cpu")


def smooth_images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def debug(**settings):
    return load_config(
        None, {"denoiser.preset": "debug", **{f"denoiser.{k}": v for k, v in settings.items()}}
    ).denoiser


def fit_all(config, stop_at=None):
    images = smooth_images(40)
    fit = start_fit(config, 0, CPU)
    reports, states = [], []

    def keep(state):
        states.append({"state": torch.load(_saved(state.state()), weights_only=True)})

    run_fit(fit, images[4:], images[:4], 0, reports.append, keep)
    return fit, reports, states


def _saved(state):
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return stream


def test_denoising_beats_doing_nothing():
    _, reports, _ = fit_all(debug(iterations=150, learning_rate=3e-3))
    assert reports[-1].denoise_psnr > reports[-1].noisy_psnr + 3
    assert reports[-1].loss < reports[0].loss


def test_resumed_training_equals_an_uninterrupted_one():
    config = debug(iterations=40, checkpoint_every=20)
    whole, _, states = fit_all(config)
    images = smooth_images(40)
    resumed = start_fit(config, 5, CPU)
    resumed.restore(states[0]["state"])
    assert resumed.iteration == 20
    run_fit(resumed, images[4:], images[:4], 0, lambda _: None, lambda _: None)
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name
    assert resumed.history == whole.history


def test_two_workers_see_the_batch_of_one():
    from eclipse_ray.diffusion.training import _draw_batch

    config, images = debug(batch_size=16), smooth_images(40)
    whole = _draw_batch(config, images, 3, 0, 0, 1)
    halves = [_draw_batch(config, images, 3, 0, rank, 2) for rank in range(2)]
    for index in range(3):
        assert torch.equal(whole[index], torch.cat([half[index] for half in halves]))


def test_timesteps_stay_below_t_max():
    from eclipse_ray.diffusion.training import _draw_batch

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


def test_a_perfect_prediction_has_no_loss():
    x0, epsilon = torch.rand(2, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 1, 2, 3])
    schedule = cosine_alphas_cumprod(20)
    assert loss_simple(lambda _x, _t: epsilon, x0, epsilon, t, schedule) == 0
    off = loss_simple(lambda _x, _t: epsilon + 0.5, x0, epsilon, t, schedule)
    assert float(off) == 0.25


def test_noised_images_keep_the_schedule_variance():
    x0 = torch.zeros(1, 3, 64, 64)
    schedule = cosine_alphas_cumprod(4000)
    x_t = add_noise(x0, torch.randn(1, 3, 64, 64), torch.tensor([99]), schedule)
    assert abs(float(x_t.std()) - 0.0499) < 0.002


def test_psnr_closed_form():
    x = torch.zeros(1, 3, 4, 4)
    assert abs(psnr(x, x + 0.2) - 20) < 1e-4


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
