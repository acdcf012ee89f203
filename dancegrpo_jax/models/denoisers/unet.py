"""Denoising UNet of Stable Diffusion 1.x (diffusers' UNet2DConditionModel).

Each level is a list of resnets, each followed by a spatial transformer in the CrossAttn blocks. Widths differ from
unit to unit, so the units are unrolled; the transformer blocks inside one unit are equal and scanned (`Stack`).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.conv_blocks import Downsample, ResnetBlock, Upsample
from dancegrpo_jax.models.layers import (
    Conv,
    FeedForward,
    GroupNorm,
    LayerNorm,
    Linear,
    Stack,
    TimestepEmbedding,
    merge,
    rematerialise,
    split,
    timestep_embedding,
)
from dancegrpo_jax.sharding import row_parallel

TRANSFORMER_NORM_EPS = 1e-6  # the GroupNorm before a spatial transformer; `norm_eps` is that of every other GroupNorm


@dataclass(frozen=True)
class Config:
    """UNet2DConditionModel's config.json: diffusers' names and class defaults.

    `attention_head_dim` is the number of heads (diffusers keeps the old name), one for all levels or one per level.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False  # about fp16 in PyTorch: the softmax is always fp32 here

    FIXED: ClassVar[dict] = {
        "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "downsample_padding": 1,
        "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "num_attention_heads": None,
        "dual_cross_attention": False, "class_embed_type": None, "addition_embed_type": None,
        "addition_time_embed_dim": None, "num_class_embeds": None, "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
        "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None,
        "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None, "cross_attention_norm": None, "addition_embed_type_num_heads": 64,
    }

    def __post_init__(self):
        n = len(self.block_out_channels)
        for name, kind in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            types = getattr(self, name)
            if len(types) != n or not set(types) <= {kind, f"CrossAttn{kind}"}:
                raise ValueError(f"UNet2DConditionModel: {name} must hold {n} of {kind!r} and 'CrossAttn{kind}' "
                                 f"(one per entry of block_out_channels), got {types}")
        for name in ("layers_per_block", "cross_attention_dim"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"UNet2DConditionModel: {name} must be one integer, got {getattr(self, name)}")
        for name, values in (("attention_head_dim", self.heads), ("transformer_layers_per_block", self.depths)):
            if len(values) != n:
                raise ValueError(f"UNet2DConditionModel: {name} must be one integer or {n} (one per entry of "
                                 f"block_out_channels), got {values}")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"UNet2DConditionModel: width {width} is not divisible into {heads} heads "
                                 "(attention_head_dim is the number of heads)")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        return _per_level(self.attention_head_dim, len(self.block_out_channels))

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks per unit, per level."""
        return _per_level(self.transformer_layers_per_block, len(self.block_out_channels))


class Attention(nnx.Module):
    """Multi-head attention, queries from x [B, N, D], keys and values from `context` [B, L, Dc] (x if None)."""

    def __init__(self, features: int, context_features: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = Linear(features, features, use_bias=False, rngs=rngs)
        self.to_k = Linear(context_features, features, use_bias=False, rngs=rngs)
        self.to_v = Linear(context_features, features, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs)])

    def __call__(self, x, context=None):
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attention(q, k, v))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, GEGLU feed-forward; each pre-normed and residual."""

    def __init__(self, features: int, context_features: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(features, eps=1e-5)
        self.attn1 = Attention(features, features, heads, rngs=rngs)
        self.norm2 = LayerNorm(features, eps=1e-5)
        self.attn2 = Attention(features, context_features, heads, rngs=rngs)
        self.norm3 = LayerNorm(features, eps=1e-5)
        self.ff = FeedForward(features, activation="geglu", rngs=rngs)

    def __call__(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return (x + self.ff(self.norm3(x)),)


class SpatialTransformer(nnx.Module):
    """Residual transformer over the positions of [B, H, W, C] (diffusers' Transformer2DModel)."""

    def __init__(self, features: int, heads: int, depth: int, config: Config, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(config.norm_num_groups, features, eps=TRANSFORMER_NORM_EPS)
        # The same map either way; the released files store it as a 1x1 convolution or as a matrix.
        projection = (lambda: Linear(features, features, rngs=rngs)) if config.use_linear_projection else (
            lambda: Conv(features, features, 1, rngs=rngs))
        self.proj_in = projection()
        self.transformer_blocks = Stack(
            lambda rngs: TransformerBlock(features, config.cross_attention_dim, heads, rngs=rngs), depth, rngs=rngs)
        self.proj_out = projection()
        self.depth = depth

    def __call__(self, x, context, remat: str = "full"):
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        # A single block is recomputed as part of its unit (`_call`); recomputing it once more would be a waste.
        (tokens,) = self.transformer_blocks((tokens,), context, remat=remat if self.depth > 1 else "none")
        return x + self.proj_out(tokens.reshape(x.shape))


class DownBlock(nnx.Module):
    def __init__(self, in_features: int, level: int, config: Config, *, rngs: nnx.Rngs):
        features = config.block_out_channels[level]
        widths = [in_features] + [features] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(width, features, config, rngs) for width in widths])
        if config.down_block_types[level] == "CrossAttnDownBlock2D":
            self.attentions = nnx.List([_transformer(level, config, rngs) for _ in widths])
        if level < len(config.block_out_channels) - 1:
            self.downsamplers = nnx.List([Downsample(features, padding=1, rngs=rngs)])

    def __call__(self, x, time, context, remat: str):
        """Returns the feature map and the list of skips."""
        skips = []
        for i in range(len(self.resnets)):
            x = _unit(self, i, x, time, context, remat)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        features = config.block_out_channels[-1]
        self.resnets = nnx.List([_resnet(features, features, config, rngs) for _ in range(2)])
        self.attentions = nnx.List([_transformer(-1, config, rngs)])

    def __call__(self, x, time, context, remat: str):
        x = _unit(self, 0, x, time, context, remat)
        return _call(self.resnets[1], x, time, remat=remat)


class UpBlock(nnx.Module):
    """`skips` are the widths of the feature maps that are concatenated before each resnet, in that order."""

    def __init__(self, in_features: int, skips: list[int], level: int, kind: str, config: Config, *, rngs: nnx.Rngs):
        features = config.block_out_channels[level]
        widths = [in_features] + [features] * config.layers_per_block
        self.resnets = nnx.List([_resnet(width + skip, features, config, rngs)
                                 for width, skip in zip(widths, skips, strict=True)])
        if kind == "CrossAttnUpBlock2D":
            self.attentions = nnx.List([_transformer(level, config, rngs) for _ in widths])
        if level > 0:
            self.upsamplers = nnx.List([Upsample(features, rngs=rngs)])

    def __call__(self, x, skips: list, time, context, remat: str):
        for i in range(len(self.resnets)):
            x = _unit(self, i, jnp.concatenate([x, skips.pop()], axis=-1), time, context, remat)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise (or v, as trained) in latents, given a time and text features."""

    Config = Config
    SHARDING = row_parallel("to_out.0", "net.2", "proj_out", "linear_2")

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1, rngs=rngs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], rngs=rngs)

        features, skips = widths[0], [widths[0]]  # width now, widths of the feature maps kept for the way up
        self.down_blocks = nnx.List([])
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(features, level, config, rngs=rngs))
            features = width
            skips += [width] * (config.layers_per_block + (level < len(widths) - 1))

        self.mid_block = MidBlock(config, rngs=rngs)

        self.up_blocks = nnx.List([])
        for level, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            block_skips = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(features, block_skips, level, kind, config, rngs=rngs))
            features = widths[level]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv(widths[0], config.out_channels, 3, padding=1, rngs=rngs)

    def __call__(self, sample, timestep, encoder_hidden_states, dtype=jnp.float32, remat: str = "full"):
        """One evaluation.

        Args:
          sample: noisy latents [B, h, w, C]; h and w divisible by 2^(levels - 1).
          timestep: [B], 0..1000.
          encoder_hidden_states: text features [B, L, cross_attention_dim].
          dtype: of the computation (static).
          remat: what the backward pass recomputes of each resnet and each transformer (`layers.REMAT`).
        Returns: [B, h, w, out_channels] fp32.
        Raises: ValueError for a latent size that does not halve evenly.
        """
        multiple = 2 ** (len(self.down_blocks) - 1)
        if sample.shape[1] % multiple or sample.shape[2] % multiple:
            raise ValueError(f"UNet2DConditionModel: latents of {sample.shape[1]}x{sample.shape[2]} are not a multiple "
                             f"of {multiple} in height and width")
        time = self.time_embedding(timestep_embedding(timestep, self.config.block_out_channels[0]).astype(dtype))
        context = encoder_hidden_states.astype(dtype)
        x = self.conv_in(sample.astype(dtype))

        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context, remat)
            skips += more
        x = self.mid_block(x, time, context, remat)
        for block in self.up_blocks:
            x = block(x, skips, time, context, remat)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)


def _unit(block, i: int, x, time, context, remat: str):
    """Resnet i of a level and, where there is one, the transformer after it."""
    x = _call(block.resnets[i], x, time, remat=remat)
    if hasattr(block, "attentions"):
        x = _call(block.attentions[i], x, context, remat, remat=remat)
    return x


def _call(module: nnx.Module, x, condition, *static, remat: str):
    """module(x, condition, *static), recomputed in the backward pass as `remat` says."""
    graphdef, params = split(module)  # as arguments, so that their gradients flow through the checkpoint
    return rematerialise(lambda params, x, condition: merge(graphdef, params)(x, condition, *static), remat)(
        params, x, condition)


def _resnet(in_features: int, out_features: int, config: Config, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(in_features, out_features, groups=config.norm_num_groups, eps=config.norm_eps,
                       time_features=4 * config.block_out_channels[0], rngs=rngs)


def _transformer(level: int, config: Config, rngs: nnx.Rngs) -> SpatialTransformer:
    return SpatialTransformer(config.block_out_channels[level], config.heads[level], config.depths[level], config,
                              rngs=rngs)


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * levels
