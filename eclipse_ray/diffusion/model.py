"""The denoising network: a diffusers `UNet2DModel` built from the settings, and the module that samplers call."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from eclipse_ray.config import DenoiserConfig
from eclipse_ray.diffusion.schedule import cosine_alphas_cumprod

IMAGE_CHANNELS = 3


def build_unet(config: DenoiserConfig) -> UNet2DModel:
    """Return an untrained U-Net that predicts epsilon from (x_t, t)."""
    levels = range(len(config.block_out_channels))
    attends = [level in config.attention_levels for level in levels]
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=IMAGE_CHANNELS,
        out_channels=IMAGE_CHANNELS,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        add_attention=any(attends),
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        dropout=config.dropout,
    )


class Denoiser(nn.Module):
    """A network, its noise schedule and its recommended use; what the samplers work with.

    `alphas_cumprod` is float64 (T,); timesteps below `t_max` were trained; `t_star` and `num_inference_steps` are
    recommended; both sides of an image must be divisible by `size_multiple`.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, unet: UNet2DModel, *, num_train_timesteps: int, t_max: int, t_star: int, num_inference_steps: int
    ) -> None:
        super().__init__()
        self.unet = unet
        self.t_max, self.t_star, self.num_inference_steps = t_max, t_star, num_inference_steps
        self.register_buffer("alphas_cumprod", cosine_alphas_cumprod(num_train_timesteps), persistent=False)
        self.size_multiple = 2 ** (len(unet.config.block_out_channels) - 1)

    @property
    def num_train_timesteps(self) -> int:
        """T of the schedule."""
        return len(self.alphas_cumprod)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the raw model output (B, 3, H, W) for x_t in [-1, 1] (B, 3, H, W) and integer t (B,)."""
        output: Tensor = self.unet(x_t, t).sample
        return output

    def accepts(self, height: int, width: int) -> bool:
        """Return whether the network can take images of this size, in pixels."""
        return height % self.size_multiple == 0 and width % self.size_multiple == 0 and height * width > 0


def build_denoiser(unet: UNet2DModel, config: DenoiserConfig) -> Denoiser:
    """Return the network with the schedule and recommendation of its training settings."""
    return Denoiser(
        unet,
        num_train_timesteps=config.num_train_timesteps,
        t_max=config.t_max or config.num_train_timesteps,
        t_star=config.t_star,
        num_inference_steps=config.num_inference_steps,
    )


def parameter_count(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def default_device() -> torch.device:
    """Return the CUDA device if this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
