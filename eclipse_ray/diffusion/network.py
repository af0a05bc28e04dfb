"""The denoising network built from the settings, and the module that samplers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from eclipse_ray.config import TILES, Computed, DenoiserConfig, Precision, Sampler
from eclipse_ray.diffusion.process import IMAGE_CHANNELS, cosine_alphas_cumprod
from eclipse_ray.diffusion.shuffled import Int8Network, ShuffledConfig, ShuffledNetwork
from eclipse_ray.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

# From (x_t, t) to the raw output, whatever stands between: a denoiser, its tiled view, a test's closed form.
Network = Callable[[Tensor, Tensor], Tensor]


def build_unet(config: DenoiserConfig) -> UNet2DModel | ShuffledNetwork:
    """Return an untrained U-Net that predicts epsilon, and with learned_range a variance mix, from (x_t, t)."""
    out_channels = IMAGE_CHANNELS * (2 if config.variance_type == "learned_range" else 1)
    if config.network == "shuffled":
        return ShuffledNetwork(ShuffledConfig(out_channels, config.block_out_channels, config.layers_per_block))
    # Here and not above: diffusers takes seconds to import.
    from diffusers import UNet2DModel

    levels = range(len(config.block_out_channels))
    attends = [level in config.attention_levels for level in levels]
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=IMAGE_CHANNELS,
        out_channels=out_channels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        add_attention=any(attends),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        # Not given, the middle attention of a scale-shift network would go without normalisation.
        attn_norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        dropout=config.dropout,
    )


class Denoiser(nn.Module):
    """A network, its noise schedule and its recommended use; what the samplers work with.

    `alphas_cumprod` is float64 (T,); timesteps below `t_max` were trained; `t_star`, `num_inference_steps` and
    `sampler` are recommended; both sides of an image must be divisible by `size_multiple` (`diffusion.tiling`
    takes care of others, and of images larger than `tile`). The network is shown `t * timestep_scale`. `filters`,
    by content hash of the images that went through them, are undone first. `int8` says whether the network can be
    computed in that precision, and `networks` are those made for it, by timestep.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: UNet2DModel | ShuffledNetwork,
        alphas_cumprod: Tensor,
        *,
        t_max: int,
        t_star: int,
        num_inference_steps: int,
        sampler: Sampler = "ddpm",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels_last(unet)
        self.unet = unet
        self.t_max, self.t_star, self.num_inference_steps = t_max, t_star, num_inference_steps
        self.sampler = sampler
        self.timestep_scale = timestep_scale
        self.precision: Computed = "float32"
        self.int8 = isinstance(unet, ShuffledNetwork)
        self.networks: dict[int, Int8Network] = {}
        self.filters: dict[str, Tensor] = {}
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        # diffusers' networks halve the sides between two levels.
        halved = 2 ** (len(unet.config.block_out_channels) - 1)
        self.size_multiple = int(getattr(unet, "size_multiple", halved))
        self.tile = int(getattr(unet, "tile", TILES["unet2d"]))

    @property
    def num_train_timesteps(self) -> int:
        """T of the schedule."""
        return len(self.alphas_cumprod)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the raw model output for x_t in [-1, 1] (B, 3, H, W) and integer t (B,) in 0..T-1.

        It is eps_pred (B, 3, H, W), followed by the variance mix on 3 more channels if that was learned. In int8
        all timesteps must be the same, and there are no gradients.
        """
        if self.precision == "int8":
            return self._in_int8(x_t, t)
        shown = t if self.timestep_scale == 1 else t * self.timestep_scale
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output: Tensor = self.unet(x_t, shown).sample
        return output.to(x_t.dtype)

    def __getstate__(self) -> dict[str, object]:
        # Packed weights can be neither copied nor pickled; they are made again.
        return {**self.__dict__, "networks": {}}

    def _in_int8(self, x_t: Tensor, t: Tensor) -> Tensor:
        (step,) = set(t.tolist())
        if step not in self.networks:
            assert isinstance(self.unet, ShuffledNetwork)
            shown = step * self.timestep_scale
            self.networks[step] = Int8Network(self.unet, shown, float(self.alphas_cumprod[step]))
        return self.networks[step](x_t)

    @property
    def learned_range(self) -> bool:
        """Whether the second half of the output channels is a variance mix."""
        return int(self.unet.config.out_channels) == 2 * IMAGE_CHANNELS


def build_denoiser(unet: UNet2DModel | ShuffledNetwork, config: DenoiserConfig) -> Denoiser:
    """Return the network with the schedule and recommendation of its training settings."""
    return Denoiser(
        unet,
        cosine_alphas_cumprod(config.num_train_timesteps),
        t_max=config.t_max or config.num_train_timesteps,
        t_star=config.t_star,
        num_inference_steps=config.num_inference_steps,
        sampler=config.sampler,
        timestep_scale=timestep_scale(config),
    )


def timestep_scale(config: DenoiserConfig) -> float:
    """Return the factor between a timestep and what the network is shown."""
    return 1000 / config.num_train_timesteps if config.rescale_timesteps else 1.0


def channels_last(module: nn.Module) -> None:
    """Lay the weights out channels last: a quarter faster on a CPU, and what tensor cores want."""
    # torch has no type for this call.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def fast_precision(device: torch.device) -> Precision:
    """Return bfloat16 if `device` has instructions for it, else float32.

    GPUs since Ampere and CPUs with AVX512-BF16 have; elsewhere it is emulated, several times slower than float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and bool(_capabilities().get("avx512_bf16"))
    return "bfloat16" if fast else "float32"


def set_precision(denoiser: Denoiser, precision: Computed | None) -> None:
    """Let `denoiser` compute in `precision`, of None in the fast one of its device.

    Raises ConfigError for another word, and for int8 where there are no instructions for it, or a network that
    cannot be computed so.
    """
    device = denoiser.alphas_cumprod.device
    if precision not in (None, *get_args(Computed)):
        raise ConfigError(f"purify.precision {precision}: expected one of {', '.join(get_args(Computed))}")
    check_precision(denoiser.int8, precision)
    check_device(device, precision)
    denoiser.precision = precision or fast_precision(device)


def check_device(device: torch.device, precision: Computed | None) -> None:
    """Raise ConfigError for int8 if `device` has no instructions for it."""
    if precision == "int8" and not has_int8(device):
        cpu = "a CPU without it" if _capabilities() else f"a CPU of which torch {torch.__version__} cannot tell"
        where = cpu if device.type == "cpu" else device.type
        raise ConfigError(
            f"purify.precision int8 needs a CPU with AVX512-VNNI, and this machine computes on {where}; "
            "leave it null"
        )


def check_precision(int8: bool, precision: Computed | None) -> None:
    """Raise ConfigError for int8 if the network of a denoiser cannot be computed so."""
    if precision == "int8" and not int8:
        raise ConfigError(
            "purify.precision int8 is for the default network (denoiser.network shuffled), and this denoiser has "
            "another; leave it null"
        )


def has_int8(device: torch.device) -> bool:
    """Say whether `device` multiplies bytes faster than floats; older CPUs may overflow at it."""
    return device.type == "cpu" and bool(_capabilities().get("avx512_vnni"))


def _capabilities() -> dict[str, object]:
    # Older versions of torch cannot tell.
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


def default_device() -> torch.device:
    """Return the CUDA device if this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
