"""FLUX.1's transformer: rectified-flow velocity of packed image tokens, conditioned on T5 tokens and pooled CLIP text.

Dual-stream blocks keep separate weights for text and image and share one attention; single-stream blocks run on the
concatenation [text, image]. Attribute paths are those of diffusers' `FluxTransformer2DModel`, which is also the
reference of the parity tests (tests/parity/test_flux.py). Shapes: B batch, L text tokens, N = rows * cols image
tokens, D = num_attention_heads * attention_head_dim, S = L + N.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dancegrpo_jax.models.attention import attention, split_heads
from dancegrpo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    Stack,
    TimestepEmbedding,
    gelu_tanh,
    timestep_embedding,
)
from dancegrpo_jax.sharding import BATCH, axis_size, constrain, row_parallel

TOKENS = (BATCH, "seq", None)  # axes of activations [B, n, D]
EPS = 1e-6  # of every normalisation in the model
TIME_FEATURES = 256
ROPE_THETA = 10_000.0


class FluxTransformer2DModel(nnx.Module):
    """Velocity prediction of FLUX.1 (dev with `guidance_embeds`, schnell without)."""

    SHARDING = row_parallel("to_out.0", "to_add_out", "net.2", "proj_out", "linear_2")

    @dataclasses.dataclass(frozen=True)
    class Config:
        """Fields and defaults of diffusers' config.json; `out_channels=None` means `in_channels`."""

        patch_size: int = 1
        in_channels: int = 64
        out_channels: int | None = None
        num_layers: int = 19
        num_single_layers: int = 38
        attention_head_dim: int = 128
        num_attention_heads: int = 24
        joint_attention_dim: int = 4096
        pooled_projection_dim: int = 768
        guidance_embeds: bool = False
        axes_dims_rope: tuple[int, ...] = (16, 56, 56)

        def __post_init__(self):
            axes = self.axes_dims_rope
            if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(dim % 2 for dim in axes):
                raise ValueError(f"axes_dims_rope={axes} must be three even numbers that add up to "
                                 f"attention_head_dim={self.attention_head_dim}")

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        heads, dim = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
        self.config = config
        self.time_text_embed = TimeTextEmbedding(config.pooled_projection_dim, dim,
                                                 guidance=config.guidance_embeds, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, dim, rngs=rngs)
        self.x_embedder = Linear(config.in_channels, dim, rngs=rngs)
        self.transformer_blocks = Stack(lambda rngs: DualBlock(dim, heads, rngs=rngs), config.num_layers, rngs=rngs)
        self.single_transformer_blocks = Stack(lambda rngs: SingleBlock(dim, heads, rngs=rngs),
                                               config.num_single_layers, rngs=rngs)
        self.norm_out = AdaLayerNorm(dim, 2, rngs=rngs)
        self.proj_out = Linear(dim, config.patch_size**2 * (config.out_channels or config.in_channels), rngs=rngs)

    def __call__(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, grid: tuple[int, int],
                 guidance=None, dtype=jnp.float32, remat: str = "full"):
        """Predicts the velocity, d x / d sigma.

        Args:
          hidden_states: packed latents [B, N, in_channels], see `pack`.
          encoder_hidden_states: text tokens [B, L, joint_attention_dim]; padding is attended to, as in the reference.
          pooled_projections: pooled text [B, pooled_projection_dim].
          timestep: fp32 [B] on the model's scale, 1000 * sigma.
          grid: (rows, cols) of the image tokens in raster order, static.
          guidance: fp32 [B] on the model's scale, 1000 * guidance_scale; given exactly when `guidance_embeds`.
          dtype: compute dtype, static. Sinusoids, norm statistics, rotations and softmax are fp32 regardless.
          remat: what the backward pass recomputes of each block (`layers.REMAT`), static.
        Returns: fp32 [B, N, patch_size^2 * out_channels].
        Raises: ValueError if `grid` does not fit N or `guidance` does not fit the config.
        """
        rows, cols = grid
        text_len = encoder_hidden_states.shape[1]
        if rows * cols != hidden_states.shape[1]:
            raise ValueError(f"grid {rows} x {cols} does not fit {hidden_states.shape[1]} image tokens")
        temb = self.time_text_embed(timestep, guidance, pooled_projections.astype(dtype))
        # The modulations of all blocks at once: their weights are a quarter of the model and see one vector a sample, so
        # on a mesh it is the vectors that travel, not the weights.
        condition = constrain(jax.nn.silu(temb), "data", "fsdp")
        dual, single = (jax.tree.map(lambda m: constrain(m, None, BATCH, None, None), blocks.each("modulate", condition))
                        for blocks in (self.transformer_blocks, self.single_transformer_blocks))
        layout = TokenLayout(text_len, rows, cols)
        rotary = rotary_tables(layout.positions(), self.config.axes_dims_rope)
        valid = layout.valid()

        image = layout.pad(self.x_embedder(hidden_states.astype(dtype)))
        text = layout.pad(self.context_embedder(encoder_hidden_states.astype(dtype)))
        text, image = self.transformer_blocks((text, image), rotary, valid, layout, own=dual, remat=remat)
        (x,) = self.single_transformer_blocks((layout.join(text, image),), rotary, valid, own=single, remat=remat)
        _, image = layout.separate(x)
        x, scale, shift = self.norm_out(image, self.norm_out.linear(condition)[:, None])
        return self.proj_out(x * (1 + scale) + shift)[:, :rows * cols].astype(jnp.float32)


class TimeTextEmbedding(nnx.Module):
    """The global conditioning vector [B, D]: time + guidance + pooled text, each through its own small MLP."""

    def __init__(self, pooled_features: int, features: int, *, guidance: bool, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, features, rngs=rngs)
        if guidance:
            self.guidance_embedder = TimestepEmbedding(TIME_FEATURES, features, rngs=rngs)
        self.text_embedder = TimestepEmbedding(pooled_features, features, rngs=rngs)

    def __call__(self, timestep, guidance, pooled):
        if (guidance is not None) != hasattr(self, "guidance_embedder"):
            raise ValueError("guidance must be given exactly when the config has guidance_embeds")
        temb = self.timestep_embedder(timestep_embedding(timestep, TIME_FEATURES).astype(pooled.dtype))
        if guidance is not None:
            temb += self.guidance_embedder(timestep_embedding(guidance, TIME_FEATURES).astype(pooled.dtype))
        return temb + self.text_embedder(pooled)


class AdaLayerNorm(nnx.Module):
    """LayerNorm without parameters, and the `n` vectors [B, 1, D] that its modulation linear(silu(temb)) [B, 1, n D] holds."""

    def __init__(self, features: int, n: int, *, rngs: nnx.Rngs):
        self.linear = Linear(features, n * features, rngs=rngs)
        self.norm, self.n = LayerNorm(features, eps=EPS, affine=False), n

    def __call__(self, x, modulation):
        return self.norm(x), *jnp.split(modulation, self.n, axis=-1)


class FluxAttention(nnx.Module):
    """Self-attention with normalised, rotated queries and keys; `joint` adds the text stream's own projections."""

    def __init__(self, features: int, heads: int, *, joint: bool, rngs: nnx.Rngs):
        linear, norm = partial(Linear, features, features, rngs=rngs), partial(RMSNorm, features // heads, eps=EPS)
        self.heads = heads
        self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        if joint:  # a single block's output projection is fused with its MLP's, in the block's proj_out
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.to_out, self.to_add_out = nnx.List([linear(), nnx.Module()]), linear()

    def __call__(self, x, rotary, valid, layout=None, text=None):
        """[B, S, D] -> [B, S, D] unprojected; with `text`, (text [B, L, D], image [B, N, D]), both projected."""
        q = self.norm_q(split_heads(self.to_q(x), self.heads))
        k = self.norm_k(split_heads(self.to_k(x), self.heads))
        v = split_heads(self.to_v(x), self.heads)
        if text is None:
            return attention(rotate(q, rotary), rotate(k, rotary), v, valid=valid)
        q = layout.join(self.norm_added_q(split_heads(self.add_q_proj(text), self.heads)), q)
        k = layout.join(self.norm_added_k(split_heads(self.add_k_proj(text), self.heads)), k)
        v = layout.join(split_heads(self.add_v_proj(text), self.heads), v)
        text, image = layout.separate(attention(rotate(q, rotary), rotate(k, rotary), v, valid=valid))
        return self.to_add_out(text), self.to_out[0](image)


class DualBlock(nnx.Module):
    """Text and image streams with their own modulation and MLP, and one joint attention."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm1_context = AdaLayerNorm(features, 6, rngs=rngs), AdaLayerNorm(features, 6, rngs=rngs)
        self.attn = FluxAttention(features, heads, joint=True, rngs=rngs)
        self.norm2 = LayerNorm(features, eps=EPS, affine=False)
        self.ff = FeedForward(features, activation="gelu_pytorch_tanh", rngs=rngs)
        self.ff_context = FeedForward(features, activation="gelu_pytorch_tanh", rngs=rngs)

    def modulate(self, condition):
        """The modulations [B, 1, 6 D] of image and text."""
        return self.norm1.linear(condition)[:, None], self.norm1_context.linear(condition)[:, None]

    def __call__(self, text, image, modulation, text_modulation, rotary, valid, layout):
        x, shift, scale, *image_rest = self.norm1(image, modulation)
        c, c_shift, c_scale, *text_rest = self.norm1_context(text, text_modulation)
        c, x = self.attn(x * (1 + scale) + shift, rotary, valid, layout, text=c * (1 + c_scale) + c_shift)
        text = self._finish(text, c, self.ff_context, *text_rest)
        image = self._finish(image, x, self.ff, *image_rest)
        return constrain(text, *TOKENS), constrain(image, *TOKENS)

    def _finish(self, x, attended, feed_forward, gate, ff_shift, ff_scale, ff_gate):
        x = x + gate * attended
        return x + ff_gate * feed_forward(self.norm2(x) * (1 + ff_scale) + ff_shift)


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel on [text, image] tokens, with one output projection for both."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.norm = AdaLayerNorm(features, 3, rngs=rngs)
        self.proj_mlp = Linear(features, 4 * features, rngs=rngs)
        self.proj_out = Linear(5 * features, features, rngs=rngs)
        self.attn = FluxAttention(features, heads, joint=False, rngs=rngs)

    def modulate(self, condition):
        """The modulation [B, 1, 3 D], as a tuple."""
        return (self.norm.linear(condition)[:, None],)

    def __call__(self, x, modulation, rotary, valid):
        y, shift, scale, gate = self.norm(x, modulation)
        y = y * (1 + scale) + shift
        y = jnp.concatenate([self.attn(y, rotary, valid), gelu_tanh(self.proj_mlp(y))], axis=-1)
        return (constrain(x + gate * self.proj_out(y), *TOKENS),)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where text and image tokens lie in the joint sequence, on a mesh whose `seq` axis splits it into `parts`.

    Each stream is padded to a multiple of the parts; part r of the joint sequence holds part r of the text and part r of
    the image, so that joining and separating moves nothing between devices. With one part that is [text, image].
    """

    text_len: int
    rows: int
    cols: int
    parts: int = dataclasses.field(default_factory=lambda: axis_size("seq"))

    def pad(self, x):
        """Tokens [B, n, D], padded at the end and split over the mesh."""
        return constrain(jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.parts), (0, 0))), *TOKENS)

    def join(self, text, image):
        """[B, L, ...] and [B, N, ...], padded, to [B, S, ...]."""
        concatenate = np.concatenate if isinstance(text, np.ndarray) else jnp.concatenate
        parts = [x.reshape(x.shape[0], self.parts, -1, *x.shape[2:]) for x in (text, image)]
        return concatenate(parts, axis=2).reshape(text.shape[0], -1, *text.shape[2:])

    def separate(self, x):
        """The inverse of `join`."""
        x = x.reshape(x.shape[0], self.parts, -1, *x.shape[2:])
        return tuple(part.reshape(x.shape[0], -1, *x.shape[3:]) for part in (
            jnp.split(x, [-(-self.text_len // self.parts)], axis=2)))

    def _place(self, table: np.ndarray) -> np.ndarray:
        """Rows [L + N, ...] for text and image tokens, put where the tokens are; padding gets zeros."""
        streams = (np.pad(x, ((0, -len(x) % self.parts), *((0, 0),) * (x.ndim - 1)))[None]
                   for x in np.split(table, [self.text_len]))
        return self.join(*streams)[0]

    def positions(self) -> np.ndarray:
        """`image_positions` of every token, [S, 3]."""
        return self._place(image_positions(self.text_len, self.rows, self.cols))

    def valid(self) -> np.ndarray | None:
        """bool [S], False for padding; None if there is none."""
        valid = self._place(np.ones(self.text_len + self.rows * self.cols, bool))
        return None if valid.all() else valid


def image_positions(text_len: int, rows: int, cols: int) -> np.ndarray:
    """Positions [S, 3] of [text, image] tokens: zero for text (no rotation), (0, row, col) for image."""
    positions = np.zeros((text_len + rows * cols, 3))
    positions[text_len:, 1:] = np.indices((rows, cols)).reshape(2, -1).T
    return positions


def rotary_tables(positions: np.ndarray, axes_dims: tuple[int, ...], theta: float = ROPE_THETA):
    """Tables for `rotate`, (cos, sin) fp32 [S, 1, d], d = sum(axes_dims), computed in float64 on the host.

    Axis i of `positions` [S, len(axes_dims)] turns the next axes_dims[i] features, frequencies theta^(-2j / dim).
    Both members of a pair share their angle; the first of each pair has its sine negated.
    """
    angles = [positions[:, i, None] * theta ** (-np.arange(0, dim, 2) / dim) for i, dim in enumerate(axes_dims)]
    angles = np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1)[:, None]
    sign = np.where(np.arange(angles.shape[-1]) % 2, 1.0, -1.0)
    return np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)


def rotate(x, tables):
    """Rotates the feature pairs (0, 1), (2, 3), ... of x [B, S, heads, d] in fp32, by `rotary_tables`."""
    cos, sin = tables
    y = x.astype(jnp.float32)
    # Each feature's partner by two rolls and a select: strided slices of the minor axis would be slow on TPU.
    partner = jnp.where(jnp.arange(y.shape[-1]) % 2, jnp.roll(y, 1, axis=-1), jnp.roll(y, -1, axis=-1))
    return (y * cos + partner * sin).astype(x.dtype)


def pack(latents):
    """Latents [B, H, W, C] -> tokens [B, H/2 * W/2, 4 C]: 2 x 2 patches in raster order, features as (C, 2, 2)."""
    b, h, w, c = latents.shape
    return latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, 4 * c)


def unpack(tokens, grid: tuple[int, int]):
    """The inverse of `pack`: tokens [B, rows * cols, 4 C] -> latents [B, 2 rows, 2 cols, C], grid = (rows, cols)."""
    rows, cols = grid
    x = tokens.reshape(tokens.shape[0], rows, cols, -1, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(tokens.shape[0], 2 * rows, 2 * cols, -1)
