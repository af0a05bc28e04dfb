"""Fit a denoiser on the enlarged sparse clean set; knows nothing of Ray, which only wraps and reports."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eclipse_ray.config import DenoiserConfig
from eclipse_ray.diffusion.network import (
    Denoiser,
    Network,
    build_denoiser,
    build_unet,
    channels_last,
    fast_precision,
)
from eclipse_ray.diffusion.noise import noise
from eclipse_ray.diffusion.process import (
    IMAGE_CHANNELS,
    add_noise,
    mixed_log_variance,
    posterior,
    predict_x0,
    split_output,
)
from eclipse_ray.diffusion.sampling import to_model_range
from eclipse_ray.diffusion.shuffled import ShuffledNetwork
from eclipse_ray.quality import psnr


@dataclass(frozen=True)
class ImageBuffer:
    """Images one after another: pixels uint8 (total,), offsets int64 (N,), sizes (height, width) int64 (N, 2)."""

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.offsets)

    def select(self, indices: Tensor) -> ImageBuffer:
        """Return those images, over the same pixels."""
        return ImageBuffer(self.pixels, self.offsets[indices], self.sizes[indices])

    def to(self, device: torch.device) -> ImageBuffer:
        """Return the buffer on a device."""
        return ImageBuffer(self.pixels.to(device), self.offsets.to(device), self.sizes.to(device))


def image_buffer(pixels: Tensor, sizes: Tensor) -> ImageBuffer:
    """Return the buffer of uint8 (total,) pixels of images with `sizes` int64 (N, 2), in that order."""
    ends = torch.cumsum(3 * sizes.prod(dim=1), dim=0)
    return ImageBuffer(pixels, ends - 3 * sizes.prod(dim=1), sizes)


def crops(images: ImageBuffer | Tensor, indices: Tensor, places: Tensor, side: int) -> Tensor:
    """Return uint8 (B, side, side, 3) cut from images[indices], on their device.

    `images` may also be uint8 (N, H, W, 3). places, float (B, 2) in [0, 1), says where down and across each crop
    lies; every position is equally likely for uniform ones. No image may be smaller than `side`.
    """
    buffer = images if isinstance(images, ImageBuffer) else _stacked(images)
    device = buffer.pixels.device
    indices, places = indices.to(device), places.to(device)
    room = buffer.sizes[indices] - side
    corner = (places * (room + 1)).to(torch.int64)
    row = corner[:, :1] + torch.arange(side, device=device)
    start = buffer.offsets[indices, None] + 3 * (row * buffer.sizes[indices, 1:] + corner[:, 1:])
    # Every line of every crop is a run of 3 * side values: a view of all such runs, indexed by where they start.
    return buffer.pixels.unfold(0, 3 * side, 1)[start].view(-1, side, side, 3)


def centre_crops(images: ImageBuffer, side: int) -> Tensor:
    """Return the middle of every image, uint8 (N, side, side, 3)."""
    middle = torch.full((len(images), 2), 0.5, dtype=torch.float64)
    return crops(images, torch.arange(len(images)), middle, side)


def _stacked(images: Tensor) -> ImageBuffer:
    count, height, width = images.shape[:3]
    sizes = torch.tensor([height, width], device=images.device).expand(count, 2)
    offsets = torch.arange(count, device=images.device) * (3 * height * width)
    return ImageBuffer(images.reshape(-1), offsets, sizes)


MOST_SPOTS = 4
"""Most recoloured pixels of an image, see `draw_spots`."""


def draw_spots(shape: tuple[int, int, int], share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which pixels of a batch become spots, and their colours, for a denoiser that removes such pixels.

    `shape` is (B, H, W). Which: bool (B, 1, H, W), true at 1 to MOST_SPOTS places of a `share` of the images,
    drawn evenly. Colours: float32 (B, 3, H, W), drawn evenly from [-1, 1] for each spot and channel, else zero.
    """
    size, height, width = shape
    spotted = torch.rand(size, generator=generator) < share
    counts = torch.randint(1, MOST_SPOTS + 1, (size,), generator=generator) * spotted
    places = torch.randint(height * width, (size, MOST_SPOTS), generator=generator)
    drawn = 2 * torch.rand(size, MOST_SPOTS, 3, generator=generator) - 1
    which = torch.zeros(size, 1, height * width, dtype=torch.bool)
    colours = torch.zeros(size, 3, height * width)
    # One after another: where two spots meet, the later one is seen.
    for number in range(MOST_SPOTS):
        rows = (counts > number).nonzero().flatten()
        which[rows, 0, places[rows, number]] = True
        colours[rows, :, places[rows, number]] = drawn[rows, number]
    return which.view(size, 1, height, width), colours.view(size, 3, height, width)


def loss_simple(eps_pred: Tensor, epsilon: Tensor) -> Tensor:
    """Return the mean squared error of eps_pred of each image (B,), from (B, 3, H, W) (Ho et al. 2020, eq. 14)."""
    return (eps_pred - epsilon).square().mean(dim=(1, 2, 3))


TYPICAL_SPOTS, TYPICAL_INVERSION = 7 / 127.5, 14 / 127.5
"""Usual sizes of a perturbation (root mean square, on [-1, 1]), which weigh timesteps in `loss_perturbed`.

Four spots on an image of 32 pixels; and the middle of the bounds of inverted poisons.
"""


def loss_perturbed(
    eps_pred: Tensor, epsilon: Tensor, delta: Tensor, t: Tensor, alphas_cumprod: Tensor, typical: float
) -> Tensor:
    """Return the loss of each image (B,) that makes x0_pred the image without its perturbation `delta`.

    x_t is sqrt(abar) (x0 + delta) + sqrt(1 - abar) epsilon, and x0_pred is (x_t - sqrt(1 - abar) eps_pred) /
    sqrt(abar). With SNR = abar / (1 - abar) that is x0 where eps_pred is epsilon + sqrt(SNR) delta. The squared
    error is divided by 1 + SNR typical^2, the size of that target: SNR has no bound towards t = 0, and a few small
    timesteps would otherwise decide the weights.
    """
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    snr = abar / (1 - abar)
    target = epsilon + snr.sqrt().to(epsilon.dtype) * delta
    return loss_simple(eps_pred, target) / (1 + snr.flatten() * typical**2).to(epsilon.dtype)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(other_mean, other_variance)) in nats, element by element."""
    log_ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (torch.exp(log_ratio) - 1 - log_ratio + distance)


def decoder_nll(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return -log of the probability that a Gaussian falls into the 8-bit level of x0 (Ho et al. 2020, eq. 13).

    x0 lies on the levels in [-1, 1]; the lowest and the highest take the tails. Nats, element by element; at most
    -log(1e-12), as in the published code.
    """
    scale = torch.exp(-0.5 * log_variance)
    upper = torch.where(x0 > 1 - 1 / 255, math.inf, (x0 + 1 / 255 - mean) * scale)
    lower = torch.where(x0 < -1 + 1 / 255, -math.inf, (x0 - 1 / 255 - mean) * scale)
    # Mirrored into the lower tail, and by erfc, so that the difference of two small numbers keeps its digits.
    mirror = lower + upper > 0
    high, low = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    probability = 0.5 * (torch.erfc(-high / math.sqrt(2)) - torch.erfc(-low / math.sqrt(2)))
    return -torch.log(probability.clamp(min=1e-12))


def loss_vlb(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the term L_t of the variational bound of each image (B,), bits per dimension (Ho et al. 2020, eq. 5).

    output is (B, 6, H, W), eps_pred and variance mix; x0 and x_t (B, 3, H, W); t (B,). Only the variance learns
    from it: eps_pred is detached (Nichol & Dhariwal 2021, section 3.1). x0_pred is not clipped.
    """
    eps_pred, mix = output.detach()[:, :IMAGE_CHANNELS].double(), output[:, IMAGE_CHANNELS:].double()
    # float64 throughout: betas near t = 0 are differences of numbers that agree in five digits.
    x0, x_t = x0.double(), x_t.double()
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    abar, abar_previous = alphas_cumprod[t].view(-1, 1, 1, 1), before[t].view(-1, 1, 1, 1)
    beta = 1 - alphas_cumprod / before
    beta_tilde = beta * (1 - before) / (1 - alphas_cumprod)
    # beta_tilde of t = 0 is zero; the published code puts that of t = 1 in its place.
    low, high = beta_tilde[t.clamp(min=1)].log().view(-1, 1, 1, 1), beta[t].log().view(-1, 1, 1, 1)
    true_mean, _ = posterior(x_t, x0, abar, abar_previous)
    x0_pred = (x_t - (1 - abar).sqrt() * eps_pred) / abar.sqrt()
    mean, _ = posterior(x_t, x0_pred, abar, abar_previous)
    log_variance = mixed_log_variance(mix, low, high)
    divergence = gaussian_kl(true_mean, low, mean, log_variance)
    nats = torch.where(t.view(-1, 1, 1, 1) == 0, decoder_nll(x0, mean, log_variance), divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def loss_hybrid(
    network: Network,
    x0: Tensor,
    epsilon: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    vlb_weight: float,
    delta: Tensor | None = None,
    typical: float = TYPICAL_SPOTS,
) -> Tensor:
    """Return the training loss of each image (B,): loss_simple, plus vlb_weight T loss_vlb for learned variances.

    Nichol & Dhariwal 2021, eq. 16: the bound is a sum over T timesteps, so a drawn term counts T times. With
    `delta` (B, 3, H, W), usually of size `typical`, the network is shown x0 + delta and learns x0
    (`loss_perturbed`).
    """
    x_t = add_noise(x0 if delta is None else x0 + delta, epsilon, t, alphas_cumprod)
    output = network(x_t, t)
    eps_pred, mix = split_output(output)
    if delta is None:
        simple = loss_simple(eps_pred, epsilon)
    else:
        simple = loss_perturbed(eps_pred, epsilon, delta, t, alphas_cumprod, typical)
    if mix is None:
        return simple
    bound = loss_vlb(output, x0, x_t, t, alphas_cumprod)
    return simple + vlb_weight * len(alphas_cumprod) * bound.to(simple.dtype)


@torch.inference_mode()
def heldout_psnr(
    denoiser: Denoiser, x0: Tensor, t_star: int, seed: int = 0, batch_size: int = 64
) -> tuple[float, float]:
    """Return (denoised, noisy) PSNR in dB of clean images (N, 3, H, W in [-1, 1]) at depth t_star.

    Denoised is the one-step x0_pred; noisy is x_t divided by sqrt(abar). The noise is fixed by the seed.
    """
    abar = float(denoiser.alphas_cumprod[t_star - 1])
    ids = [f"heldout-{index}" for index in range(len(x0))]
    denoised, noisy = [], []
    for start in range(0, len(x0), batch_size):
        part = x0[start : start + batch_size]
        t = torch.full((len(part),), t_star - 1, device=x0.device)
        epsilon = noise(seed, ids[start : start + len(part)], t_star, tuple(part.shape[1:]), x0.device)
        x_t = add_noise(part, epsilon, t, denoiser.alphas_cumprod)
        denoised.append(predict_x0(x_t, split_output(denoiser(x_t, t))[0], abar))
        noisy.append(x_t / abar**0.5)
    return psnr(torch.cat(denoised), x0, peak=2), psnr(torch.cat(noisy), x0, peak=2)


def start_ema(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the module's floating-point parameters and buffers, by name."""
    return {
        name: value.detach().clone() for name, value in module.state_dict().items() if value.is_floating_point()
    }


@torch.no_grad()
def update_ema(
    average: dict[str, Tensor], module: nn.Module, decay: float, iteration: int, warmup: bool = True
) -> None:
    """Move the average towards the module, in place; with warm-up the decay is (1 + i) / (10 + i) if smaller.

    Without the warm-up a short training would average over its own random start.
    """
    if warmup:
        decay = min(decay, (1 + iteration) / (10 + iteration))
    state = module.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[name] for name in average], 1 - decay)


if TYPE_CHECKING:
    from diffusers import UNet2DModel


@dataclass(frozen=True)
class Progress:
    """One point of the training curve: mean loss since the last, PSNR in dB of held-out images at t_star."""

    iteration: int
    loss: float
    denoise_psnr: float
    noisy_psnr: float


@dataclass
class Fit:
    """A training under way; `state()` and `restore()` carry it across an interruption."""

    config: DenoiserConfig
    unet: UNet2DModel | ShuffledNetwork
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return everything needed to continue, as tensors and plain values (loadable with weights_only)."""
        return {
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state()` returned."""
        self.unet.load_state_dict(state["unet"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.history = state["iteration"], state["history"]

    def averaged(self) -> Denoiser:
        """Return a denoiser with the averaged weights."""
        unet = copy.deepcopy(self.unet)
        unet.load_state_dict({**self.unet.state_dict(), **self.average})
        return build_denoiser(unet, self.config).to(next(unet.parameters()).device).eval()


def start_fit(config: DenoiserConfig, seed: int, device: torch.device) -> Fit:
    """Return an untrained network, its average and its optimiser; the start depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(config)
    unet = unet.to(device)
    channels_last(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return Fit(config, unet, start_ema(unet), optimizer)


def split_heldout(images: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of (training part, held-out part), chosen by the seed; each has at least one image."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(fraction * images)), images - 1)
    return order[count:], order[:count]


def enlarged_batch(images: int, replication: int, batch_size: int, iteration: int, seed: int) -> Tensor:
    """Return the indices (batch_size,) of one batch of the enlarged set, shuffled anew each epoch.

    The enlarged set holds every sparse image 1 + M times (arXiv 2406.15093, section 4.2): replication is how
    often an index occurs in an epoch, never a copy in memory.
    """
    size = images * (1 + replication)
    positions = torch.arange(batch_size) + iteration * batch_size
    batch = torch.empty(batch_size, dtype=torch.int64)
    for epoch in torch.unique(positions // size).tolist():
        generator = torch.Generator().manual_seed(_mix(seed, int(epoch)))
        order = torch.randperm(size, generator=generator) % images
        inside = positions // size == epoch
        batch[inside] = order[positions[inside] % size]
    return batch


def learning_rate_at(config: DenoiserConfig, iteration: int) -> float:
    """Return the learning rate: a linear warm-up, then constant or a cosine to zero."""
    warm = min(1.0, (iteration + 1) / max(1, min(config.warmup_iterations, config.iterations)))
    if config.lr_decay == "none":
        return config.learning_rate * warm
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))


Perturb = Callable[[Sequence[Tensor], int], Sequence[Tensor]]
"""What returns perturbations of batches, given those of the iterations from a number on; see `run_fit`."""
AHEAD = 128
"""Images of which perturbations are asked for at once: one at a time, a small batch is mostly overhead."""


def run_fit(
    fit: Fit,
    train: Tensor | ImageBuffer,
    heldout: Tensor,
    seed: int,
    on_report: Callable[[Progress], None],
    on_checkpoint: Callable[[Fit], None],
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    on_step: Callable[[int], None] = lambda iteration: None,
    perturb: Perturb | None = None,
) -> None:
    """Train until `iterations`; train and heldout are uint8 (N, H, W, 3) on the network's device.

    `train` may hold images larger than the training size, of several sizes too: each draw is a random crop.
    Indices, timesteps, noise and places of an iteration are drawn for the whole batch from (seed, iteration), and
    each worker takes its slice: the optimisation is the same for any number of workers that divides the batch.
    `on_step` is told the number of every finished iteration. `perturb` returns, for this worker's batches
    (B, 3, H, W) in [-1, 1] of some iterations and the number of the first, perturbations that the network learns
    to remove, as it does the spots of `denoiser.spots`.
    """
    config = fit.config
    denoiser = build_denoiser(fit.unet, config).to(heldout.device)
    denoiser.precision = config.precision or fast_precision(heldout.device)
    schedule, network = denoiser.alphas_cumprod, wrap(denoiser).train()
    typical = TYPICAL_INVERSION if perturb else TYPICAL_SPOTS
    losses: list[Tensor] = []
    for x0, epsilon, t, delta in _batches(config, train, fit.iteration, seed, rank, world_size, perturb):
        if config.dropout:
            # Its masks come from torch's global generator: keyed, so that a resumed training draws the same.
            torch.manual_seed(_mix(_mix(seed, -1 - fit.iteration), 1 + rank))
        loss = loss_hybrid(network, x0, epsilon, t, schedule, config.vlb_weight, delta, typical).mean()
        _optimise(fit, network, loss)
        losses.append(loss.detach())
        on_step(fit.iteration)
        last = fit.iteration == config.iterations
        if fit.iteration % config.report_every == 0 or last:
            _report(fit, torch.stack(losses).mean().item(), heldout, seed, on_report)
            losses.clear()
        if fit.iteration % config.checkpoint_every == 0 or last:
            on_checkpoint(fit)


def worker_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the part of a batch that one worker takes; parts differ by at most one image."""
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def _optimise(fit: Fit, network: nn.Module, loss: Tensor) -> None:
    config = fit.config
    for group in fit.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, fit.iteration)
    fit.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if config.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
    fit.optimizer.step()
    update_ema(fit.average, fit.unet, config.ema_decay, fit.iteration, config.ema_warmup)
    fit.iteration += 1


Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _batches(
    config: DenoiserConfig,
    train: Tensor | ImageBuffer,
    first: int,
    seed: int,
    rank: int,
    world_size: int,
    perturb: Perturb | None,
) -> Iterator[Batch]:
    """Yield this worker's x0, epsilon, t, and what is added to x0 if anything, from iteration `first` on."""
    ahead = max(1, AHEAD * world_size // config.batch_size) if perturb else 1
    for start in range(first, config.iterations, ahead):
        iterations = range(start, min(start + ahead, config.iterations))
        drawn = [_draw_batch(config, train, iteration, seed, rank, world_size) for iteration in iterations]
        if perturb is None:
            yield from drawn
            continue
        moved = perturb([x0 for x0, *_ in drawn], start)
        for (x0, epsilon, t, spots), delta in zip(drawn, moved, strict=True):
            yield x0, epsilon, t, delta if spots is None else delta + spots


def _draw_batch(
    config: DenoiserConfig, train: Tensor | ImageBuffer, iteration: int, seed: int, rank: int, world_size: int
) -> Batch:
    """Return this worker's x0, epsilon, t, and what spots add to x0 if there are any."""
    size, side = config.batch_size, config.image_size
    indices = enlarged_batch(len(train), config.replication, size, iteration, seed)
    generator = torch.Generator().manual_seed(_mix(seed, -1 - iteration))
    t = torch.randint(0, config.t_max or config.num_train_timesteps, (size,), generator=generator)
    epsilon = torch.randn(size, 3, side, side, generator=generator)
    # After these, and drawn where there is nothing to choose too: they are the same for images of any size.
    places = torch.rand(size, 2, generator=generator, dtype=torch.float64)
    mine = worker_slice(size, rank, world_size)
    x0 = to_model_range(crops(train, indices[mine], places[mine], side)).contiguous(
        memory_format=torch.channels_last
    )
    device = x0.device
    delta = None
    if config.spots:
        which, colours = (
            each[mine].to(device) for each in draw_spots((size, side, side), config.spots, generator)
        )
        delta = torch.where(which, colours - x0, 0.0)
    return x0, epsilon[mine].to(device, memory_format=torch.channels_last), t[mine].to(device), delta


def _report(fit: Fit, loss: float, heldout: Tensor, seed: int, on_report: Callable[[Progress], None]) -> None:
    denoised, noisy = heldout_psnr(fit.averaged(), to_model_range(heldout), fit.config.t_star, seed)
    progress = Progress(fit.iteration, loss, denoised, noisy)
    fit.history.append(dict(vars(progress)))
    on_report(progress)


def _mix(seed: int, counter: int) -> int:
    # One 64-bit seed for each (seed, counter); the odd constant keeps neighbouring runs apart.
    return (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03) % 2**63
