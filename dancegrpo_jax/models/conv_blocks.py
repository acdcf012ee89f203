"""Convolutional blocks shared by the image VAE (`vae.py`) and the UNet (`unet.py`), named as diffusers names them.

Their results are pinned to the batch's sharding. Left to itself, the partitioner may follow the kernels of an fsdp mesh
instead and compute every sample on every device: 32 GB of temporaries for Stable Diffusion's decoder on 16 v5e chips.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.layers import Conv, GroupNorm, Linear
from dancegrpo_jax.sharding import constrain_batch


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), [B, H, W, Cin] -> [B, H, W, Cout] (diffusers' ResnetBlock2D).

    Args:
      time_features: width of the time embedding; None (VAE) leaves the time term out.
    """

    def __init__(self, in_features: int, out_features: int, *, groups: int, eps: float,
                 time_features: int | None = None, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(groups, in_features, eps=eps)
        self.conv1 = Conv(in_features, out_features, 3, padding=1, rngs=rngs)
        if time_features is not None:
            self.time_emb_proj = Linear(time_features, out_features, rngs=rngs)
        self.norm2 = GroupNorm(groups, out_features, eps=eps)
        self.conv2 = Conv(out_features, out_features, 3, padding=1, rngs=rngs)
        if in_features != out_features:
            self.conv_shortcut = Conv(in_features, out_features, 1, rngs=rngs)

    def __call__(self, x, time_embedding=None):
        """x: [B, H, W, Cin]; time_embedding: [B, time_features], before its SiLU."""
        h = constrain_batch(self.conv1(jax.nn.silu(self.norm1(x))))
        if time_embedding is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return constrain_batch(h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x))


class Downsample(nnx.Module):
    """3x3 convolution with stride 2. The UNet pads 1 on every side, the VAE only at the bottom and right."""

    def __init__(self, features: int, *, padding, rngs: nnx.Rngs):
        self.conv = Conv(features, features, 3, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x):
        return constrain_batch(self.conv(x))


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: [B, H, W, C] -> [B, 2H, 2W, C]."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv = Conv(features, features, 3, padding=1, rngs=rngs)

    def __call__(self, x):
        b, h, w, c = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return constrain_batch(self.conv(doubled.reshape(b, 2 * h, 2 * w, c)))
