"""Image autoencoder of Stable Diffusion and FLUX (diffusers' AutoencoderKL).

`encode` and `decode` work on the raw latents of the network; `normalize_latents` brings them to the unit scale that
the denoisers see. The dtype of the input decides the compute dtype, norms are fp32.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.conv_blocks import Downsample, ResnetBlock, Upsample
from dancegrpo_jax.models.layers import Conv, GroupNorm, Linear
from dancegrpo_jax.sharding import row_parallel

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """AutoencoderKL's config.json: diffusers' names and class defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True  # about fp16 in PyTorch: of no effect here
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    FIXED: ClassVar[dict] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}

    def __post_init__(self):
        n = len(self.block_out_channels)
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, name) != (only,) * n:
                raise ValueError(f"AutoencoderKL: {name} must be {n} x {only!r} (one per entry of block_out_channels), "
                                 f"got {getattr(self, name)}")

    @property
    def factor(self) -> int:
        """Pixels a latent, on a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialAttention(nnx.Module):
    """Residual single-head attention over all positions of [B, H, W, C]."""

    def __init__(self, features: int, *, groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, features, eps=NORM_EPS)
        self.to_q = Linear(features, features, rngs=rngs)
        self.to_k = Linear(features, features, rngs=rngs)
        self.to_v = Linear(features, features, rngs=rngs)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs)])

    def __call__(self, x):
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (split_heads(project(tokens), 1) for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attention(q, k, v)).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, features: int, config: Config, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(features, features, config, rngs) for _ in range(2)])
        if config.mid_block_add_attention:
            self.attentions = nnx.List([SpatialAttention(features, groups=config.norm_num_groups, rngs=rngs)])

    def __call__(self, x):
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    def __init__(self, in_features: int, features: int, config: Config, *, downsample: bool, rngs: nnx.Rngs):
        widths = [in_features] + [features] * config.layers_per_block
        self.resnets = nnx.List([_resnet(a, b, config, rngs) for a, b in pairwise(widths)])
        if downsample:
            self.downsamplers = nnx.List([Downsample(features, padding=((0, 1), (0, 1)), rngs=rngs)])

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UpBlock(nnx.Module):
    def __init__(self, in_features: int, features: int, config: Config, *, upsample: bool, rngs: nnx.Rngs):
        widths = [in_features] + [features] * (config.layers_per_block + 1)
        self.resnets = nnx.List([_resnet(a, b, config, rngs) for a, b in pairwise(widths)])
        if upsample:
            self.upsamplers = nnx.List([Upsample(features, rngs=rngs)])

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> mean and log-variance side by side, [B, h, w, 2C]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, rngs=rngs)
        self.down_blocks = nnx.List([
            DownBlock(widths[max(i - 1, 0)], width, config, downsample=i < len(widths) - 1, rngs=rngs)
            for i, width in enumerate(widths)])
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, C] -> images [B, H, W, 3]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1, rngs=rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.up_blocks = nnx.List([
            UpBlock(widths[max(i - 1, 0)], width, config, upsample=i < len(widths) - 1, rngs=rngs)
            for i, width in enumerate(widths)])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, padding=1, rngs=rngs)

    def __call__(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder; h = H / 2^(len(block_out_channels) - 1), C = latent_channels."""

    Config = Config
    SHARDING = row_parallel("to_out.0")
    # Stable Diffusion 1.x was released with these names of the mid-block attention.
    LEGACY_KEYS = tuple((rf"(.*\.mid_block\.attentions\.0)\.{old}\.(weight|bias)", rf"\1.{new}.\2") for old, new in
                        (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")))

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        latent = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * latent, 2 * latent, 1, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(latent, latent, 1, rngs=rngs)

    def encode(self, images):
        """Images [B, H, W, 3] in [-1, 1] -> mean and log-variance of the raw latents, each [B, h, w, C]."""
        moments = self.encoder(images)
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents, tile: int = 0):
        """Raw latents [B, h, w, C] -> images [B, H, W, 3], about [-1, 1] and not clipped.

        `tile`: if not 0, images larger than `tile` pixels are decoded in tiles of that size, which overlap by a quarter
        and are blended there (diffusers' enable_tiling). Memory no longer grows with the image; norms and attention see
        one tile at a time, so the result differs slightly.
        """
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        side = tile // self.config.factor
        if tile and max(latents.shape[1:3]) > side:
            return _tiled(self.decoder, latents, side, tile)
        return self.decoder(latents)

    def normalize_latents(self, latents):
        """Raw latents -> the denoiser's scale, (z - shift) * scaling; any shape."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalize_latents(self, latents):
        """The inverse of `normalize_latents`: what `decode` takes."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def _tiled(function, x, side: int, side_out: int):
    """function(x) for x [B, h, w, C] by tiles of `side`, outputs of `side_out`, that overlap by a quarter."""
    step, blend = side - side // 4, side_out // 4

    def mix(before, after, axis):  # fades `before`'s end into `after`'s beginning
        n = min(before.shape[axis], after.shape[axis], blend)
        weight = (jnp.arange(n, dtype=after.dtype) / n).reshape(-1, *(1,) * (3 - axis))
        end = jax.lax.slice_in_dim(before, before.shape[axis] - n, before.shape[axis], axis=axis)
        start, rest = jnp.split(after, [n], axis=axis)
        return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)

    rows, above = [], []
    for i in range(0, x.shape[1], step):
        row = []
        for number, j in enumerate(range(0, x.shape[2], step)):
            tile = function(x[:, i:i + side, j:j + side])
            if above:
                tile = mix(above[number], tile, 1)
            if row:
                tile = mix(row[-1], tile, 2)
            row.append(tile)
        above, keep = row, side_out - blend
        rows.append(jnp.concatenate([tile[:, :keep, :keep] for tile in row], axis=2))
    return jnp.concatenate(rows, axis=1)


def _resnet(in_features: int, out_features: int, config: Config, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(in_features, out_features, groups=config.norm_num_groups, eps=NORM_EPS, rngs=rngs)
